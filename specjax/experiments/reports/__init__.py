"""Reports on results: `summary.md`, the tables of a terminal, plots. Nothing here measures.

A report reads the rows of `results.json`, and what a sweep keeps in `cells.json`: plain values, no models.
"""
