"""EleutherAI's lm-evaluation-harness on models of this package: the model class, tasks from files, and the command."""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"  # the task files that come with the package
