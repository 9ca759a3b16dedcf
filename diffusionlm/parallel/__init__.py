"""The device mesh, multi-host processes, and signal handling."""
