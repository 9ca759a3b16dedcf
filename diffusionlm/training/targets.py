"""The inputs, labels and weights of one global batch; `objectives.mdm_targets` shifts them for shifted models."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusionlm.config import Config, DiffusionConfig
from diffusionlm.config_data import ANSWER, PARTS, PROMPT
from diffusionlm.diffusion.corruption import corrupt, corrupt_held_out, dropped_prompts, pad_to_longest
from diffusionlm.diffusion.noise import noise_key, prompts_key
from diffusionlm.diffusion.objectives import (
    Targets,
    arm_answer_targets,
    arm_targets,
    example_segments,
    has_predecessor,
    mdm_targets,
    row_shares,
)

# "tokens" and "segment_ids", int32 (B, L) with L = sequence_length + 1; in training on a mixture also "source", int32
# (B,).
Batch = dict[str, jax.Array]


def targets(cfg: Config, batch: Batch, batch_index: jax.Array) -> Targets:
    """Return the noisy inputs, labels and weights of one global batch; the weights are normalised over all of it."""
    if cfg.objective == "arm":
        full = _arm_targets(cfg, batch)
        # Each cross-entropy has the weight that it has in the mean.
        return full if "source" not in batch else _of_mixture(full, batch, full.weight_BxT.sum(-1))
    tokens_BxL, segments_BxL = batch["tokens"], batch["segment_ids"]
    segmented, examples = cfg.data.packing == "segments", cfg.data.holds_examples
    if not segmented and not examples:
        segments_BxL = _one_segment(segments_BxL)
    tokens_BxT, segments_BxT = tokens_BxL[:, :-1], segments_BxL[:, :-1]
    assert cfg.mask_id is not None  # as validated: only an autoregressive model has no mask
    key = noise_key(cfg.run.seed, batch_index)
    with jax.named_scope("corruption"):
        maskable_BxT = ~_is_suppressed(cfg, tokens_BxT)
        ids_BxT = segments_BxT
        if examples:
            segments_BxT, learned_BxT = _learned(cfg, ids_BxT)
            maskable_BxT &= learned_BxT
        if cfg.diffusion.alignment == "shifted":
            maskable_BxT &= has_predecessor(segments_BxT)
        corrupted = corrupt(cfg.diffusion, cfg.mask_id, tokens_BxT, segments_BxT, maskable_BxT, key)
        if fraction := cfg.diffusion.prompt_dropout:
            key = prompts_key(cfg.run.seed, batch_index)
            dropped_BxT = dropped_prompts(fraction, segments_BxT, ids_BxT % PARTS == PROMPT, key)
            hidden_BxT = jnp.where(dropped_BxT, jnp.int32(cfg.mask_id), corrupted.tokens_BxT)
            corrupted = replace(corrupted, tokens_BxT=hidden_BxT)
    full = mdm_targets(cfg.diffusion, tokens_BxT, corrupted)
    return full if "source" not in batch else _of_mixture(full, batch, row_shares(cfg.diffusion, corrupted))


def _arm_targets(cfg: Config, batch: Batch) -> Targets:
    """Return the targets of next-token prediction."""
    tokens_BxL, segments_BxL = batch["tokens"], batch["segment_ids"]
    if cfg.data.holds_examples:
        return arm_answer_targets(cfg.diffusion, tokens_BxL, segments_BxL, cfg.data.learn)
    segmented = cfg.data.packing == "segments"
    return arm_targets(tokens_BxL, segments_BxL if segmented else _one_segment(segments_BxL), segmented=segmented)


def _one_segment(segments_BxL: jax.Array) -> jax.Array:
    """Return the segments of rows whose documents attend to each other."""
    return (segments_BxL != 0).astype(jnp.int32)


def _of_mixture(full: Targets, batch: Batch, share_B: jax.Array) -> Targets:
    """Return targets whose rows know their source, and their part of the loss."""
    return replace(full, source_B=batch["source"], share_B=share_B)


def _learned(cfg: Config, ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the segments of a batch of examples, with the EOS padding that they learn, and what of them is learned.

    Segments are int32 (B, T), a number for each example of a row and 0 where nothing is seen; the other is bool (B, T).
    """
    if cfg.data.packing == "packed_examples":
        segments_BxT = jnp.where(ids_BxT != 0, ids_BxT // PARTS + 1, 0)
        answer_BxT = (ids_BxT != 0) & (ids_BxT % PARTS != PROMPT)
    else:
        segments_BxT, answer_BxT = pad_to_longest(ids_BxT, cfg.data.pad_group)
    return segments_BxT, segments_BxT != 0 if cfg.data.learn == "all" else answer_BxT


def _is_suppressed(cfg: Config, tokens_BxT: jax.Array) -> jax.Array:
    """Return True where the text holds an id that is never predicted: a mask id that is also an ordinary word."""
    return jnp.isin(tokens_BxT, jnp.asarray(cfg.suppressed_ids, jnp.int32))


class HeldOut(NamedTuple):
    """The targets of a held-out batch, and the tokens that count."""

    targets: Targets
    scored_BxT: jax.Array  # float32, 1 where a label is scored
    labels_BxT: jax.Array  # int32


def held_out_targets(cfg: Config, batch: Batch, batch_index: jax.Array, draw: jax.Array) -> HeldOut:
    """Return what is scored of held-out batch `batch_index` (see `step.eval_step`), with the noise of `draw`."""
    if cfg.objective == "arm":
        return _held_out_arm(cfg, batch)
    return _held_out_mdm(cfg, batch, batch_index, draw)


def _held_out_arm(cfg: Config, batch: Batch) -> HeldOut:
    tokens_BxL, segments_BxL = batch["tokens"], batch["segment_ids"]
    if cfg.data.holds_examples:
        full = arm_answer_targets(DiffusionConfig(), tokens_BxL, segments_BxL, cfg.data.learn)
    else:
        segmented = cfg.data.packing == "segments"
        segments_BxT = segments_BxL[:, :-1] if segmented else (segments_BxL[:, :-1] != 0).astype(jnp.int32)
        # The network sees T positions, as in training, so that the same kernel will do; the last predicts nothing.
        full = arm_targets(tokens_BxL, jnp.pad(segments_BxT, ((0, 0), (0, 1))), segmented=segmented)
    return HeldOut(full, full.counted_BxT, full.labels_BxT)


def _held_out_mdm(cfg: Config, batch: Batch, batch_index: jax.Array, draw: jax.Array) -> HeldOut:
    tokens_BxT, ids_BxT = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    maskable_BxT = ~_is_suppressed(cfg, tokens_BxT)
    if cfg.data.holds_examples:
        segments_BxT = example_segments(ids_BxT)
    else:
        segments_BxT = ids_BxT if cfg.data.packing == "segments" else (ids_BxT != 0).astype(jnp.int32)
    answers_only = cfg.data.holds_examples and cfg.data.learn == "answers"
    if answers_only:
        maskable_BxT &= ids_BxT % PARTS == ANSWER
    if not answers_only or cfg.diffusion.alignment == "shifted":
        maskable_BxT &= has_predecessor(segments_BxT)
    assert cfg.mask_id is not None  # as above
    record_B = batch_index * len(tokens_BxT) + jnp.arange(len(tokens_BxT))
    corrupted = corrupt_held_out(cfg.mask_id, tokens_BxT, segments_BxT, maskable_BxT, record_B, draw)
    bound = DiffusionConfig(normalization="tokens", alignment=cfg.diffusion.alignment)
    full = mdm_targets(bound, tokens_BxT, corrupted)
    return HeldOut(full, corrupted.scored_BxT.astype(jnp.float32), tokens_BxT)
