"""Weights of released models in and out: `importing.import_weights`, `exporting.export_weights`.

A further family is one entry in `families.FAMILIES`: a table of names, and how its config is read and written.
"""
