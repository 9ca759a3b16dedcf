"""The canvas: the rows that are denoised, with their prompt tokens, their gaps, and the block of each gap position."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec
from diffusionlm.parallel.mesh import Array, row_ways

CANVAS_MULTIPLE = 64  # canvases are padded to a multiple of this, so that rows of similar lengths share a program

MOST_CANDIDATES = 64  # combinations of lengths that are tried for the spans of one row


class Span(NamedTuple):
    """A gap of `least` to `most` tokens."""

    least: int
    most: int


Template = Sequence[int | None | Span]  # a row: token ids, None where one is to be generated, gaps of several lengths


class Canvas(NamedTuple):
    """A batch of rows, each followed by padding (segment id 0) that nothing attends to.

    The number of rows is a bucket (`padded_rows`); the rows at its end that no template fills are idle: all padding,
    with nothing to generate.
    """

    tokens_BxT: Array  # int32; masked positions hold the mask id
    masked_BxT: Array  # bool: to be generated
    segment_ids_BxT: Array  # int32: 1, or 0 for padding
    block_BxT: Array  # int32: the block of a position to be generated, from 0 in its row; -1 elsewhere
    row_ids_B: Array  # int32: the number that keys the noise of each row


def bucket_size(count: int) -> int:
    """Return the size that `count` rows or positions are padded to: 1, 2, 4, or a multiple of 8.

    Sizes of one bucket share a compiled program.
    """
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def padded_rows(count: int, ways: int) -> int:
    """Return the number of rows that a batch of `count` is padded to on a mesh that splits it `ways` ways.

    It is a multiple of `ways`, because a batch that is not split would be computed whole by every device: the bucket
    rounded up, or the bucket of one device's rows times `ways`, whichever is smaller.
    """
    return min(-(-bucket_size(count) // ways) * ways, bucket_size(-(-count // ways)) * ways)


def span_lengths(r: int, template: Template) -> list[tuple[int, ...]]:
    """Return every combination of lengths for the spans of row `r`, short ones first.

    Raises:
      UserError: there are more than `MOST_CANDIDATES` combinations.
    """
    lengths = [range(token.least, token.most + 1) for token in template if isinstance(token, Span)]
    if (count := math.prod(map(len, lengths))) > MOST_CANDIDATES:
        raise UserError(
            f"row {r} has gaps with {count} combinations of lengths, more than {MOST_CANDIDATES}; narrow their bounds"
        )
    return list(itertools.product(*lengths))


def expand_spans(template: Template, lengths: Sequence[int]) -> list[int | None]:
    """Return a row in which each span has the length that is given for it."""
    remaining = iter(lengths)
    parts = ([None] * next(remaining) if isinstance(token, Span) else [token] for token in template)
    return [*itertools.chain.from_iterable(parts)]


def build_canvas(
    cfg: ModelSpec,
    templates: Sequence[Template],
    block_length: int,
    row_ids: Sequence[int],
    row_names: Sequence[int] | None = None,
) -> Canvas:
    """Check a batch of templates and lay them out as a padded canvas.

    Args:
      cfg: the model.
      templates: the rows, without spans.
      block_length: gap positions per block, counted through all gaps of a row; 0: one block.
      row_ids: the numbers that key the noise, one per row.
      row_names: the numbers by which error messages call the rows; None: their indices.

    Raises:
      UserError: there are no templates, or the model cannot fill one of them.
    """
    if not templates:
        raise UserError("no prompts to complete; give at least one (an empty prompt samples unconditionally)")
    row_names = range(len(templates)) if row_names is None else row_names
    for r, template in zip(row_names, templates, strict=True):
        _check(cfg, r, template)
    if len(row_ids) != len(templates) or not all(0 <= i < 2**31 for i in row_ids):
        raise UserError(f"row_ids={list(row_ids)!r} must be {len(templates)} numbers from 0 to {2**31 - 1}, one a row")
    B, longest = padded_rows(len(templates), row_ways()), max(map(len, templates))
    T = min(-(-longest // CANVAS_MULTIPLE) * CANVAS_MULTIPLE, cfg.max_length)
    tokens_BxT, masked_BxT = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    segment_ids_BxT, block_BxT = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    row_ids_B = np.zeros(B, np.int32)
    row_ids_B[: len(templates)] = row_ids
    for r, template in enumerate(templates):
        gap_N = np.array([token is None for token in template])
        N = len(template)
        # Causal attention never sees what is not generated yet, so there any id will do.
        tokens_BxT[r, :N] = [(cfg.mask_id or 0) if token is None else token for token in template]
        masked_BxT[r, :N] = gap_N
        segment_ids_BxT[r, :N] = 1
        block_BxT[r, :N] = np.where(gap_N, (np.cumsum(gap_N) - 1) // (block_length or N), -1)
    return Canvas(tokens_BxT, masked_BxT, segment_ids_BxT, block_BxT, row_ids_B)


def _check(cfg: ModelSpec, r: int, template: Template) -> None:
    prompt = np.array([token for token in template if token is not None], np.int64)
    gap_is_last = list(template[: len(prompt)]) == prompt.tolist()
    if len(prompt) == len(template):
        raise UserError(f"row {r} has nothing to generate; leave a gap in it")
    if cfg.mask_id is not None and (prompt == cfg.mask_id).any():
        raise UserError(
            f"prompt {r} holds the mask token (id {cfg.mask_id}), which only stands for new tokens; remove it"
        )
    if ((prompt < 0) | (prompt >= cfg.model.vocab_size)).any():
        raise UserError(
            f"prompt {r} holds an id outside the vocabulary, [0, {cfg.model.vocab_size}); use the model's tokenizer"
        )
    if cfg.shifted and template[0] is None:
        raise UserError(f"prompt {r} is empty: nothing predicts this model's first token; give one, such as BOS")
    if cfg.autoregressive and not gap_is_last:
        raise UserError(f"row {r} has given tokens after a gap; only masked diffusion models can fill in between")
    if len(template) > cfg.max_length and not gap_is_last:
        raise UserError(
            f"row {r} has {len(template)} tokens with its gaps and any start token, more than the model's context of "
            f"{cfg.max_length}; shorten it"
        )
    if len(template) > cfg.max_length:
        N, new = len(prompt), len(template) - len(prompt)
        raise UserError(
            f"length={new} after prompt {r}, of {N} tokens with any start token, exceeds the model's context of "
            f"{cfg.max_length}; use a length of at most {max(cfg.max_length - N, 0)}, or a shorter prompt"
        )
