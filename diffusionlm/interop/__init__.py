"""Import and export of weights in the formats of other systems: `import_weights` and `export_weights`."""
