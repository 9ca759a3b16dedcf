"""Gaps of known numbers of tokens, each filled with steps of its own number."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffusionlm.evaluation import answers
from diffusionlm.evaluation.infilling import fill_middles
from diffusionlm.evaluation.results import Metric, Result
from diffusionlm.evaluation.session import Record
from diffusionlm.evaluation.stories import Row
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig


def fill_words(
    model: LoadedModel, rows: Sequence[Row], batch: Sequence[int], sampling: SamplingConfig, batch_size: int
) -> list[tuple[str, int]]:
    """Return what the model writes for the middle of some rows, and the forward passes that it took.

    Rows whose middles have equal numbers of tokens share a batch: where the steps are not set, they are that number, so
    that those of a row do not depend on the others.

    Args:
      model: the model; an autoregressive one sees the text before the middle alone.
      rows: all rows.
      batch: the indices of those to fill, which key their noise.
      sampling: the settings.
      batch_size: the rows that a batch is filled up to.
    """
    groups: dict[int, list[int]] = {}
    for r in batch:
        groups.setdefault(len(rows[r].middle), []).append(r)
    filled = dict[int, tuple[str, int]]()
    for n, members in groups.items():
        settings = dataclasses.replace(sampling, length=n)
        middles = fill_middles(model, [rows[r] for r in members], settings, members, batch_size)
        filled |= dict(zip(members, middles, strict=True))
    return [filled[r] for r in batch]


def result(
    model: LoadedModel,
    metrics: dict[str, Metric],
    records: Sequence[Record],
    config: dict[str, Any],
    sampling: SamplingConfig,
    shown: Sequence[dict[str, Any]],
) -> Result:
    """Return the result of a task, as `answers.result` does.

    The length and, if they are not set, the steps are null: each gap has its own.
    """
    resolved = answers.result(model, metrics, records, config, sampling, shown)
    own = {"length": None, "steps": sampling.steps}
    return dataclasses.replace(resolved, config=resolved.config | own)
