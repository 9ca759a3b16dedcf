"""Gaps of known numbers of tokens, each filled with steps of its own number."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers
from diffusionlm.evaluation.results import Metric, Result
from diffusionlm.evaluation.session import Record
from diffusionlm.evaluation.stories import Row
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import infill


def settings(model: LoadedModel, rows: Sequence[Row], sampling: SamplingConfig, task: str) -> SamplingConfig:
    """Return the settings, checked, with the length of the longest middle.

    Args:
      model: the model that fills the middles.
      rows: the rows.
      sampling: the settings; their length must be the default.
      task: the name of the task, for the message.

    Raises:
      UserError: the length is set, or any of `LoadedModel.sampling_config`.
    """
    if sampling.length != SamplingConfig().length:
        raise UserError(
            f"length={sampling.length} has no effect in {task}: each gap has its own number of tokens; leave it out"
        )
    sampling = dataclasses.replace(sampling, length=max(len(row.middle) for row in rows))
    model.sampling_config(sampling)
    return sampling


def order(model: LoadedModel, rows: Sequence[Row], sampling: SamplingConfig) -> list[int]:
    """Return the indices of rows in an order in which those that can share a batch are neighbours.

    Args:
      model: the model that fills their middles.
      rows: the rows.
      sampling: the settings.
    """
    return sorted(range(len(rows)), key=lambda r: (_own_steps(model, rows[r], sampling), sum(map(len, rows[r]))))


def fill_middles(
    model: LoadedModel, rows: Sequence[Row], batch: Sequence[int], sampling: SamplingConfig
) -> list[tuple[str, int]]:
    """Return what the model writes for the middle of some rows, and the forward passes that it took.

    Where the steps are not set, they are the number of tokens of the middle, so that a row does not depend on the
    others: rows share a batch if these numbers are equal.

    Args:
      model: the model; an autoregressive one sees the text before the middle alone.
      rows: all rows.
      batch: the indices of those to fill, which key their noise.
      sampling: the settings; length is ignored.
    """
    groups: dict[int, list[int]] = {}
    for r in batch:
        groups.setdefault(_own_steps(model, rows[r], sampling), []).append(r)
    filled = dict[int, tuple[str, int]]()
    for members in groups.values():
        middles = _fill(model, [rows[r] for r in members], members, sampling)
        filled |= dict(zip(members, middles, strict=True))
    return [filled[r] for r in batch]


def _own_steps(model: LoadedModel, row: Row, sampling: SamplingConfig) -> int:
    """Return the steps that follow from a row; 0 if they are set, or if a step is always one token."""
    return 0 if sampling.steps or model.config.autoregressive else len(row.middle)


def _fill(
    model: LoadedModel, rows: Sequence[Row], row_ids: Sequence[int], sampling: SamplingConfig
) -> list[tuple[str, int]]:
    """Return what the model writes for the middle of rows of one batch, and the forward passes that it took."""
    one_sided = model.config.autoregressive
    # Text continues after the gap, so no text ends in it.
    cfg = dataclasses.replace(model.config, suppressed_ids=(*model.config.suppressed_ids, *model.config.eos_ids))
    templates = [[*row.before, *[None] * len(row.middle), *([] if one_sided else row.after)] for row in rows]
    with model.on_mesh():
        filled = infill(model.params, cfg, templates, sampling, row_ids=row_ids)
    middles = []
    for row, tokens, nfe in zip(rows, filled.rows, filled.nfe, strict=True):
        first, n = len(row.before), len(row.middle)
        middles.append((model.decode_after(row.before, tokens[first : first + n]), int(nfe)))
    return middles


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
