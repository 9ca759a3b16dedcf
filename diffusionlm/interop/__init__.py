"""Weights of other systems, in and out: `import_weights` and `export_weights`."""
