"""Save and load checkpoints, and the sidecar that describes their contents."""
