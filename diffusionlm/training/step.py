"""One training step and one evaluation step, as pure functions; `programs` compiles them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusionlm.config import ANSWER, Config, DiffusionConfig
from diffusionlm.diffusion.corruption import corrupt, corrupt_held_out, pad_to_longest
from diffusionlm.diffusion.cross_entropy import weighted_cross_entropy
from diffusionlm.diffusion.noise import annealing_key, noise_key
from diffusionlm.diffusion.objectives import (
    Targets,
    arm_answer_targets,
    arm_targets,
    has_predecessor,
    mdm_targets,
    predicted_share,
)
from diffusionlm.model import lora
from diffusionlm.model.attention import annealed_mask
from diffusionlm.model.spec import suppression_mask
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import Params, constrain, rows_per_device
from diffusionlm.training import bad_batches, optimizer
from diffusionlm.training.state import TrainState

Batch = dict[str, jax.Array]  # "tokens" and "segment_ids", int32 (B, L) with L = sequence_length + 1
Metrics = dict[str, jax.Array]  # float32 scalars


def train_step(cfg: Config, state: TrainState, batch: Batch, batch_index: jax.Array) -> tuple[TrainState, Metrics]:
    """Take one optimizer step on batch `batch_index`.

    A bad batch (see `SafetyConfig`) is left out: of the state, `next_index` alone advances, and the count of such
    batches in a row. Once that count is at its limit, a bad batch changes nothing, `next_index` included. As a step
    also does nothing when its batch is not the one that the state expects, the steps already dispatched behind it
    change nothing either, and the state that is then saved is the one before the failure.
    """
    full = targets(cfg, batch, batch_index)
    (loss, unweighted), grads = loss_and_grads(cfg, state.params, full, annealed_attention(cfg, batch_index))
    grad_norm = optax.tree.norm(grads)
    trained, frozen = lora.split(cfg.model, state.params)
    updates, opt_state = optimizer.build(cfg.optim, cfg.run.steps).update(grads, state.opt_state, trained)
    updates = jax.tree.map(lambda u: u * state.guard.lr_factor.astype(u.dtype), updates)  # linear in the learning rate
    params = lora.join(optax.apply_updates(trained, updates), frozen)
    guard = bad_batches.after_step(state.guard, grad_norm)
    stepped = TrainState(state.step + 1, state.next_index + 1, params, opt_state, guard)

    expected = batch_index == state.next_index
    bad = bad_batches.is_bad(cfg.safety, state.guard, state.step, loss, grad_norm)
    applied = expected & ~bad
    skipped = expected & bad & (state.guard.skips < cfg.safety.max_skips)
    state_out = jax.tree.map(lambda new, old: jnp.where(applied, new, old), stepped, state)
    state_out = state_out.replace(
        next_index=state_out.next_index + skipped.astype(jnp.int32),
        guard=state_out.guard.replace(skips=state_out.guard.skips + skipped.astype(jnp.int32)),
    )
    learning_rate = jnp.float32(optimizer.learning_rate(cfg.optim, cfg.run.steps)(state.step))
    metrics = {
        "loss": loss,
        "cross_entropy": unweighted / jnp.maximum(full.counted_BxT.sum(), 1.0),
        "grad_norm": grad_norm,
        "lr": learning_rate * state.guard.lr_factor,
        "applied": applied.astype(jnp.float32),
        "skipped": skipped.astype(jnp.float32),
    }
    return state_out, metrics


def targets(cfg: Config, batch: Batch, batch_index: jax.Array) -> Targets:
    """Return the noisy inputs, labels and weights of one global batch; the weights are normalised over all of it."""
    tokens_BxL, segments_BxL = batch["tokens"], batch["segment_ids"]
    segmented, examples = cfg.data.packing == "segments", cfg.data.packing == "examples"
    if examples and cfg.objective == "arm":
        return arm_answer_targets(cfg.diffusion, tokens_BxL, segments_BxL)
    if not segmented and not examples:
        segments_BxL = (segments_BxL != 0).astype(jnp.int32)  # one segment: documents attend to each other
    if cfg.objective == "arm":
        return arm_targets(tokens_BxL, segments_BxL, segmented=segmented)
    tokens_BxT, segments_BxT = tokens_BxL[:, :-1], segments_BxL[:, :-1]
    key = noise_key(cfg.run.seed, batch_index)
    with jax.named_scope("corruption"):
        maskable_BxT = ~_is_suppressed(cfg, tokens_BxT)
        if examples:
            segments_BxT, answer_BxT = pad_to_longest(segments_BxT, cfg.data.pad_group)
            maskable_BxT &= answer_BxT
        if cfg.diffusion.alignment == "shifted":
            maskable_BxT &= has_predecessor(segments_BxT)
        corrupted = corrupt(cfg.diffusion, cfg.mask_id, tokens_BxT, segments_BxT, maskable_BxT, key)
    return mdm_targets(cfg.diffusion, tokens_BxT, corrupted)


def _is_suppressed(cfg: Config, tokens_BxT: jax.Array) -> jax.Array:
    """Return True where the text holds an id that is never predicted: a mask id that is also an ordinary word."""
    return jnp.isin(tokens_BxT, jnp.asarray(cfg.suppressed_ids, jnp.int32))


def annealed_attention(cfg: Config, batch_index: jax.Array) -> jax.Array | None:
    """Return the positions that each may attend to while causal attention opens up, bool (T, T); None where it is full.

    On batch n of `anneal_steps` = N each later position is open with probability min(1, (n + 1) / N): one draw for all
    rows, heads and layers of a step (DiffuLLaMA, arXiv 2410.17891, Section 3.2, and its released code).
    """
    if not cfg.diffusion.anneal_steps:
        return None
    fraction = jnp.minimum(1.0, (batch_index + 1) / cfg.diffusion.anneal_steps)
    return annealed_mask(annealing_key(cfg.run.seed, batch_index), cfg.data.sequence_length, fraction)


def loss_and_grads(
    cfg: Config, params: Params, full: Targets, allowed_TxT: jax.Array | None = None
) -> tuple[tuple[jax.Array, jax.Array], Params]:
    """Return loss, unweighted sum and gradients of a global batch, in `cfg.run.microbatches` parts.

    Weights are normalised over the whole batch beforehand, so the sum over parts does not depend on their number. The
    gradients are those of the parameters that are trained (`lora.split`).
    """
    cuts = cfg.objective == "mdm" and cfg.diffusion.random_length > 0
    segmented, share = cfg.data.packing != "chunk" or cuts, predicted_share(cfg)
    trained, frozen = lora.split(cfg.model, params)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def grad(trained: Params, part: Targets) -> tuple[jax.Array, jax.Array]:
        params = lora.join(trained, frozen)
        return weighted_loss(cfg, params, part, segmented=segmented, share=share, allowed_TxT=allowed_TxT)

    if cfg.run.microbatches == 1:
        return grad(trained, full)

    def add(total: tuple, part: Targets) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, grad(trained, part)), None

    zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), trained))
    return jax.lax.scan(add, zeros, split_batch(cfg, full))[0]


def weighted_loss(
    cfg: Config,
    params: Params,
    part: Targets,
    *,
    segmented: bool,
    share: float,
    allowed_TxT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of weight * cross-entropy over (part of) a batch, and the unweighted sum over predicted labels.

    Args:
      cfg: the run.
      params: of the model.
      part: targets of some rows.
      segmented: attention stays within segments.
      share: of all positions that is usually predicted, for the cross-entropy.
      allowed_TxT: bool, positions that each may attend to; None: all.
    """
    model = Transformer(cfg.model)
    segment_ids_BxT = part.segment_ids_BxT if segmented else None
    hidden_BxTxD = model.apply({"params": params}, part.inputs_BxT, segment_ids_BxT, allowed_TxT=allowed_TxT)
    return weighted_cross_entropy(
        hidden_BxTxD,
        model.apply({"params": params}, method=Transformer.head_matrix),
        part.labels_BxT,
        part.weight_BxT,
        part.counted_BxT > 0,
        jnp.asarray(suppression_mask(cfg.model, cfg.suppressed_ids)),
        cfg.model.head_chunk,
        share,
    )


def split_batch(cfg: Config, full: Targets) -> Targets:
    """Return the A micro-batches of a global batch, stacked along a new first axis.

    Each micro-batch takes every A-th pair of rows, or row where the rows of a device are no whole number of pairs for
    each: every device keeps the rows that it holds, and antithetic pairs stay together where they can.
    """
    A = cfg.run.microbatches

    def split(x: jax.Array) -> jax.Array:
        B = x.shape[0]
        pair = 2 if rows_per_device(B) % (2 * A) == 0 else 1
        parts = x.reshape(B // (pair * A), A, pair, *x.shape[1:]).swapaxes(0, 1)
        parts = parts.reshape(A, B // A, *x.shape[1:])
        return constrain(parts, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(split, full)


def eval_step(
    cfg: Config, params: Params, batch: Batch, token_bytes_V: jax.Array, batch_index: jax.Array, draw: jax.Array
) -> Metrics:
    """Return sums over a held-out batch: nats of the bound, tokens and bytes that were scored.

    Tokens 1..T-1 of a canvas of T are scored given token 0, by both objectives, so that twins are comparable; with
    packing "segments" each document's first token is context instead. With "examples" answers are scored, with their
    EOS and without padding, given their prompts, on canvases that end there. Batch k holds records k * B to
    k * B + B - 1, and the noise of a record is fixed by (record, draw), so B and the mesh change the result by no more
    than rounding.
    """
    score = _held_out_arm if cfg.objective == "arm" else _held_out_mdm
    full, scored_BxT, labels_BxT = score(cfg, batch, batch_index, draw)
    tokens = scored_BxT.sum()
    share = 1.0 if cfg.objective == "arm" else 0.5
    loss = functools.partial(weighted_loss, cfg, params, segmented=True, share=share)
    mean = jax.lax.map(lambda part: loss(part)[0], split_batch(cfg, full)).sum()
    scored_bytes = jnp.where(scored_BxT > 0, token_bytes_V[labels_BxT], 0).sum()
    return {"nats": mean * tokens, "tokens": tokens, "bytes": scored_bytes}


class HeldOut(NamedTuple):
    """The targets of a held-out batch, and what counts of it."""

    targets: Targets
    scored_BxT: jax.Array  # float32, 1 where a label is scored
    labels_BxT: jax.Array  # int32


def _held_out_arm(cfg: Config, batch: Batch, batch_index: jax.Array, draw: jax.Array) -> HeldOut:
    tokens_BxL, segments_BxL = batch["tokens"], batch["segment_ids"]
    if cfg.data.packing == "examples":
        full = arm_answer_targets(DiffusionConfig(), tokens_BxL, segments_BxL)
    else:
        segmented = cfg.data.packing == "segments"
        segments_BxT = segments_BxL[:, :-1] if segmented else (segments_BxL[:, :-1] != 0).astype(jnp.int32)
        # The network sees T positions, as in training, so that the same kernel will do; the last predicts nothing.
        full = arm_targets(tokens_BxL, jnp.pad(segments_BxT, ((0, 0), (0, 1))), segmented=segmented)
    return HeldOut(full, full.counted_BxT, full.labels_BxT)


def _held_out_mdm(cfg: Config, batch: Batch, batch_index: jax.Array, draw: jax.Array) -> HeldOut:
    tokens_BxT, parts_BxT = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    segments_BxT = parts_BxT if cfg.data.packing == "segments" else (parts_BxT != 0).astype(jnp.int32)
    maskable_BxT = ~_is_suppressed(cfg, tokens_BxT)
    if cfg.data.packing == "examples":
        maskable_BxT &= parts_BxT == ANSWER
    if cfg.data.packing != "examples" or cfg.diffusion.alignment == "shifted":
        maskable_BxT &= has_predecessor(segments_BxT)
    record_B = batch_index * len(tokens_BxT) + jnp.arange(len(tokens_BxT))
    corrupted = corrupt_held_out(cfg.mask_id, tokens_BxT, segments_BxT, maskable_BxT, record_B, draw)
    bound = DiffusionConfig(normalization="tokens", alignment=cfg.diffusion.alignment)
    full = mdm_targets(bound, tokens_BxT, corrupted)
    return HeldOut(full, corrupted.scored_BxT.astype(jnp.float32), tokens_BxT)
