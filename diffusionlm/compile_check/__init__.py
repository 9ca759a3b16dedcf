"""Compile a run for a TPU slice on a machine that has no TPU."""
