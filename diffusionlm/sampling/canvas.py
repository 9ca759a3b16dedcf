"""The rows that are denoised: given tokens, gaps to fill, and which block each gap position belongs to."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec

CANVAS_MULTIPLE = 64  # canvases are padded to a multiple of this, so that rows of similar lengths share a program

MOST_CANDIDATES = 64  # lengths that are tried for the spans of one row


class Span(NamedTuple):
    """A gap of `least` to `most` tokens."""

    least: int
    most: int


Template = Sequence[int | None | Span]  # a row: token ids, None where one is to be generated, gaps of several lengths


class Canvas(NamedTuple):
    """A batch of rows, each followed by padding (segment id 0) that nobody attends: positions count real tokens."""

    tokens_BxT: Any  # int32; masked positions hold the mask id
    masked_BxT: Any  # bool: to be generated
    segment_ids_BxT: Any  # int32: 1, or 0 for padding
    block_BxT: Any  # int32: the block of a position to be generated, from 0 in its row; -1 elsewhere
    row_ids_B: Any  # int32: what the noise of a row is keyed by


def candidates(r: int, template: Template) -> list[list[int | None]]:
    """Row r with every choice of lengths for its spans, short ones first."""
    lengths = [range(span.least, span.most + 1) for span in template if isinstance(span, Span)]
    if (count := math.prod(map(len, lengths))) > MOST_CANDIDATES:
        raise UserError(
            f"row {r} has gaps of {count} combinations of lengths, more than {MOST_CANDIDATES}; narrow their bounds"
        )
    rows = []
    for chosen in itertools.product(*lengths):
        left = iter(chosen)
        parts = ([None] * next(left) if isinstance(token, Span) else [token] for token in template)
        rows.append([*itertools.chain.from_iterable(parts)])
    return rows


def build(
    cfg: ModelSpec,
    templates: Sequence[Template],
    block_length: int,
    row_ids: Sequence[int],
    names: Sequence[int] | None = None,
) -> Canvas:
    """The padded canvas of a batch of templates, checked.

    Args:
      cfg: the model.
      templates: the rows, without spans.
      block_length: gap positions per block, counted through all gaps of a row; 0: one block.
      row_ids: one a row.
      names: what messages call each row; None: its index.
    """
    if not templates:
        raise UserError("no prompts to complete; give at least one (an empty prompt samples unconditionally)")
    names = range(len(templates)) if names is None else names
    for r, template in zip(names, templates, strict=True):
        _check(cfg, r, template)
    if len(row_ids) != len(templates) or not all(0 <= i < 2**31 for i in row_ids):
        raise UserError(f"row_ids={list(row_ids)!r} must be {len(templates)} numbers from 0 to {2**31 - 1}, one a row")
    B, longest = len(templates), max(map(len, templates))
    T = min(-(-longest // CANVAS_MULTIPLE) * CANVAS_MULTIPLE, cfg.max_length)
    canvas = Canvas(
        tokens_BxT=np.zeros((B, T), np.int32),
        masked_BxT=np.zeros((B, T), bool),
        segment_ids_BxT=np.zeros((B, T), np.int32),
        block_BxT=np.full((B, T), -1, np.int32),
        row_ids_B=np.asarray(row_ids, np.int32),
    )
    for r, template in enumerate(templates):
        gap = np.array([token is None for token in template])
        N = len(template)
        # Causal attention never sees what is not generated yet, so there 0 will do.
        canvas.tokens_BxT[r, :N] = [(cfg.mask_id or 0) if token is None else token for token in template]
        canvas.masked_BxT[r, :N] = gap
        canvas.segment_ids_BxT[r, :N] = 1
        canvas.block_BxT[r, :N] = np.where(gap, (np.cumsum(gap) - 1) // (block_length or N), -1)
    return canvas


def _check(cfg: ModelSpec, r: int, template: Template) -> None:
    given = np.array([token for token in template if token is not None], np.int64)
    if len(given) == len(template):
        raise UserError(f"row {r} has nothing to generate; leave a gap in it")
    if cfg.mask_id is not None and (given == cfg.mask_id).any():
        raise UserError(
            f"prompt {r} holds the mask token (id {cfg.mask_id}), which only stands for new tokens; remove it"
        )
    if ((given < 0) | (given >= cfg.model.vocab_size)).any():
        raise UserError(
            f"prompt {r} holds an id outside the vocabulary, [0, {cfg.model.vocab_size}); use the model's tokenizer"
        )
    if cfg.shifted and template[0] is None:
        raise UserError(f"prompt {r} is empty: nothing predicts this model's first token; give one, such as BOS")
    if cfg.autoregressive and list(template[: len(given)]) != given.tolist():
        raise UserError(f"row {r} has given tokens after a gap; only masked diffusion models can fill in between")
    if len(template) > cfg.max_length and list(template[: len(given)]) != given.tolist():
        raise UserError(
            f"row {r} has {len(template)} tokens with its gaps and any start token, more than the model's context of "
            f"{cfg.max_length}; shorten it"
        )
    if len(template) > cfg.max_length:
        N, new = len(given), len(template) - len(given)
        raise UserError(
            f"length={new} after prompt {r}, of {N} tokens with any start token, exceeds the model's context of "
            f"{cfg.max_length}; use a length of at most {max(cfg.max_length - N, 0)}, or a shorter prompt"
        )
