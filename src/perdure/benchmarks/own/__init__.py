"""Streams of one's own pictures, from wherever they lie.

``pictures``  what was asked for: a folder, a table, a YAML file, a ``datasets`` folder or Hub id
``told``      what lies beside pictures in words: ``stream.yaml``
``rows``      pictures as they were found → tasks → a stream
``names``     what the classes are called: ``classes.json``, WordNet
``tables``    ``metadata.csv`` beside pictures, and a CSV file as a stream
``shards``    tars in WebDataset's form
``hub``       what the package ``datasets`` reads

Class folders are in ``perdure.benchmarks.folder``.
"""
