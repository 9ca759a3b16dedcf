"""The compile check: a run compiled for a TPU slice on a machine without a TPU."""
