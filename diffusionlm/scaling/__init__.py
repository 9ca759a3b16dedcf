"""IsoFLOP sweeps from end to end: run a sweep, fit the laws, write the report."""
