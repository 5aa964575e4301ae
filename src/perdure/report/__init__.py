"""Reports on runs: one self-contained HTML page (`perdure.report.html`) and one PNG (`perdure.report.figure`).

Both take the dicts read from `metrics.json` files. Nothing is imported here, so that the command line starts
without waiting for jinja2 or matplotlib.
"""
