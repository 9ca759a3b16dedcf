"""Training runs: the loop, the step, and everything that a run reads and writes."""
