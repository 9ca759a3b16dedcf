"""Checkpoints on disks and in buckets: the sidecar that says what they mean, and the store."""
