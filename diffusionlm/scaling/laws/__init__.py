"""Scaling laws: fits of the results of a sweep, with intervals, warnings and a verdict."""
