"""Many runs: methods × streams × values × orders × seeds, each a folder like any other, packed onto what there is.

``plan``    which runs there are, and where each lies; checked before any work
``job``     one run of them, in a process of its own
``places``  where jobs are done: on Ray, or one after another
``sweep``   the runs begun, done, tried again, and named where they failed
"""
