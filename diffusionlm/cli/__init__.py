"""The `diffusionlm` command: one file per group of verbs, each a thin wrapper around a function for notebooks."""
