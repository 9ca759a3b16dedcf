"""Registered experiments: one file a family of runs, each run a zero-argument function that returns its `Config`.

`diffusionlm experiments` lists them. A new run is one new function; nothing else needs an edit.
"""
