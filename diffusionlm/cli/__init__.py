"""The `diffusionlm` command: a file a group of verbs, each thin over a function that a notebook can call too."""
