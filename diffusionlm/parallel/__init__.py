"""The device mesh, processes on several hosts, and signals."""
