"""Named settings of published tables: estimator, draws, guidance, shots, lengths and blocks for each task."""

import functools
from pathlib import Path
from typing import Any

from diffusionlm import schema
from diffusionlm.errors import UserError, suggest
from diffusionlm.evaluation.harness.options import parse_text

SUFFIX = "_local"  # of the names of our own tasks, which take the settings of the harness' task of that name


class TaskSettings(schema.Record, frozen=True):
    """Describe how one task of a table was evaluated.

    Attributes:
      num_fewshot: the number of examples in the prompt; None: the task's own.
      model_args: model arguments that replace those of the table.
      gen_kwargs: arguments of generation.
      metric: the published one; None: the task's first.
      published: the published figure, percent; None: it is not known here.
    """

    num_fewshot: schema.Count | None = None
    model_args: str = ""
    gen_kwargs: str = ""
    metric: str | None = None
    published: schema.NonNegative | None = None


class Table(schema.Record, frozen=True):
    """Describe how a published table was evaluated.

    Attributes:
      title: the model and the paper.
      source: where the settings, and the published figures, are from.
      tasks: the settings of each of its tasks.
      differences: from the released code, a sentence each.
      model_args: model arguments of all tasks.
      apply_chat_template: whether prompts are messages.
    """

    title: str
    source: str
    tasks: dict[str, TaskSettings]
    differences: list[str]
    model_args: str = ""
    apply_chat_template: bool = False

    def of(self, name: str, task: str) -> tuple[TaskSettings, dict[str, Any]]:
        """Return the settings of a task, and its model arguments.

        Args:
          name: that of the table, for the message.
          task: the task's name, in the harness or with the suffix of our own tasks.

        Raises:
          UserError: the table has no such task.
        """
        key = task.removesuffix(SUFFIX)
        if key not in self.tasks:
            raise UserError(f"settings={name} has no task {task!r}{suggest(key, self.tasks)}")
        settings = self.tasks[key]
        return settings, parse_text(self.model_args) | parse_text(settings.model_args)


@functools.cache
def tables() -> dict[str, Table]:
    """Return all tables by name."""
    return schema.read_json(Path(__file__).with_name("settings.json"), dict[str, Table])


def get(name: str) -> Table:
    """Return the table of that name; raise `UserError` for an unknown one."""
    if name not in tables():
        raise UserError(f"unknown settings {name!r}{suggest(name, tables())}")
    return tables()[name]
