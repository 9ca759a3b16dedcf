"""Pairs of a prefix and a target: checked, grouped by shape, and padded to batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.model.spec import ModelSpec
from diffusionlm.parallel.mesh import Array

LENGTH_MULTIPLE = 64  # sequences are padded to a multiple of this, so that similar lengths share a program

Pair = tuple[list[int], list[int]]  # the token ids of a prefix, which may be empty, and of a target
Shape = tuple[int, int]  # (T, K): the tokens that a sequence is padded to, and those that a target is padded to
Label = TypeVar("Label")


class PairBatch(NamedTuple):
    """E sequences, each a prefix and a target."""

    tokens_ExT: Array  # int32: prefix, target, padding
    segment_ids_ExT: Array  # int32: 1, 0 for padding
    start_E: Array  # int32: length of the prefix
    n_E: Array  # int32: tokens of the target

    @classmethod
    def of(cls, pairs: Sequence[Pair], T: int, E: int) -> "PairBatch":
        """Pad pairs to T tokens; copies of the last pair fill the batch up to E rows."""
        pairs = [*pairs, *[pairs[-1]] * (E - len(pairs))]
        tokens_ExT, segment_ids_ExT = np.zeros((E, T), np.int32), np.zeros((E, T), np.int32)
        for e, (prefix, target) in enumerate(pairs):
            ids = prefix + target
            tokens_ExT[e, : len(ids)], segment_ids_ExT[e, : len(ids)] = ids, 1
        start_E = np.array([len(prefix) for prefix, _ in pairs], np.int32)
        n_E = np.array([len(target) for _, target in pairs], np.int32)
        return cls(tokens_ExT, segment_ids_ExT, start_E, n_E)

    def repeat(self, times: int) -> "PairBatch":
        """Repeat every row, copies beside each other."""

        def copies(x: Array) -> jax.Array:
            x = jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:]))
            return x.reshape(-1, *x.shape[2:])

        return PairBatch(*map(copies, self))

    def places(self, K: int) -> jax.Array:
        """Return the positions of K target tokens, int32 (E, K).

        Places beyond a target may lie beyond the sequence: they are clipped to its end, and must weigh nothing.
        """
        T = self.tokens_ExT.shape[1]
        return jnp.minimum(self.start_E[:, None] + jnp.arange(K)[None], T - 1)

    def labels(self, K: int) -> jax.Array:
        """Return the tokens at the K places of each target, int32 (E, K)."""
        return jnp.take_along_axis(jnp.asarray(self.tokens_ExT), self.places(K), axis=1)


def check_pairs(
    cfg: ModelSpec, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], settings: LikelihoodConfig
) -> list[Pair]:
    """Return (prefix, target) pairs as lists.

    Raises:
      UserError: a setting without meaning or that does not suit the model, or a pair that the model cannot score.
    """
    settings.validate()
    if cfg.autoregressive and settings.guidance:
        raise UserError(f"guidance={settings.guidance} needs a masked diffusion model, which can mask its prompt")
    checked = [(list(prefix), list(target)) for prefix, target in pairs]
    for r, pair in enumerate(checked):
        _check_pair(cfg, r, *pair)
    return checked


def _check_pair(cfg: ModelSpec, r: int, prefix: list[int], target: list[int]) -> None:
    length = len(prefix) + len(target)
    if not target:
        raise UserError(f"target {r} is empty; there is nothing to score")
    if cfg.shifted and not prefix:
        raise UserError(f"prefix {r} is empty: nothing predicts this model's first token; give one, such as BOS")
    if length > cfg.max_length:
        raise UserError(f"pair {r} has {length} tokens, more than the model's context of {cfg.max_length}; shorten it")
    for token in (*prefix, *target):
        if not 0 <= token < cfg.model.vocab_size:
            raise UserError(f"pair {r} has token {token}; ids lie in [0, {cfg.model.vocab_size})")
    if cfg.mask_id in (*prefix, *target):
        raise UserError(
            f"pair {r} has token {cfg.mask_id}, which stands for masks in this model, so that it can be neither "
            "read nor scored; leave it out"
        )
    if suppressed := set(target) & set(cfg.suppressed_ids):
        raise UserError(f"target {r} has token {suppressed.pop()}, which this model never predicts")


def group_by_shape(cfg: ModelSpec, pairs: Sequence[Pair], indices: Iterable[int]) -> dict[Shape, list[int]]:
    """Group pairs, given by index, by the shape that they are padded to; each shape is a program of its own."""
    groups: dict[Shape, list[int]] = {}
    for r in indices:
        prefix, target = pairs[r]
        padded = -(-(len(prefix) + len(target)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        T, K = min(padded, cfg.max_length), 1 << (len(target) - 1).bit_length()
        groups.setdefault((T, K), []).append(r)
    return groups


def in_batches(
    cfg: ModelSpec, pairs: Sequence[Pair], size: int, run: Callable[[PairBatch, int], jax.Array]
) -> list[Any]:
    """Return what a program gives each pair, in their order; pairs of one shape share a batch.

    Args:
      cfg: the model.
      pairs: the pairs, checked.
      size: the rows of a batch, which is filled up.
      run: dispatches the program on a batch whose targets are padded to that many tokens; returns an array (E,).
    """
    groups = group_by_shape(cfg, pairs, range(len(pairs)))
    batches = ((m[i : i + size], shape) for shape, m in groups.items() for i in range(0, len(m), size))
    outputs = ((members, run(PairBatch.of([pairs[r] for r in members], T, size), K)) for members, (T, K) in batches)
    results: list[Any] = [None] * len(pairs)
    for members, result_E in fetch_one_late(outputs):
        for r, result in zip(members, result_E.tolist(), strict=False):  # the batch is filled up
            results[r] = result
    return results


def longest_shape(cfg: ModelSpec, pairs: Sequence[Pair]) -> int:
    """Return the tokens that the longest pair is padded to; 0 without pairs."""
    return max((T for T, _ in group_by_shape(cfg, pairs, range(len(pairs)))), default=0)


def fetch_one_late(batches: Iterable[tuple[Label, jax.Array]]) -> Iterator[tuple[Label, np.ndarray]]:
    """Yield each label with its array on the host, after the next array has been dispatched.

    The device works on the next batch while the host waits for this one and prepares the one after it.
    """
    waiting: list[tuple[Label, jax.Array]] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > 1:
            label, array = waiting.pop(0)
            yield label, np.asarray(array)
    for label, array in waiting:
        yield label, np.asarray(array)
