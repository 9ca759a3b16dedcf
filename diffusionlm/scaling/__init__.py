"""Scaling laws: IsoFLOP sweeps from plan to law to next run. Nothing here is imported by a single run."""
