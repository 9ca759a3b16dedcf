"""The forward process and its objectives: schedules, noise, corruption, targets and the cross-entropy."""
