"""One training step and one evaluation step, as pure functions; `programs` compiles them."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import optax

from diffusionlm.config import Config
from diffusionlm.diffusion.cross_entropy import weighted_cross_entropy
from diffusionlm.diffusion.noise import annealing_key
from diffusionlm.diffusion.objectives import LEVELS, Targets, predicted_share
from diffusionlm.model import lora
from diffusionlm.model.attention import annealed_mask
from diffusionlm.model.positions import restarted
from diffusionlm.model.spec import suppression_mask
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import constrain, rows_per_device
from diffusionlm.training import bad_batches, optimizer
from diffusionlm.training.state import TrainState
from diffusionlm.training.targets import Batch, held_out_targets, targets
from diffusionlm.tree_types import Params, PyTree

# float32 scalars; but "levels", of masked diffusion, is that of `weighted_loss`, and "sources" that of `by_source`
Metrics = dict[str, jax.Array]


def train_step(cfg: Config, state: TrainState, batch: Batch, batch_index: jax.Array) -> tuple[TrainState, Metrics]:
    """Take one optimizer step on batch `batch_index`.

    A bad batch (see `SafetyConfig`) is left out: of the state, `next_index` alone advances, and the count of such
    batches in a row. Once that count is at its limit, a bad batch changes nothing, `next_index` included. As a step
    also does nothing when its batch is not the one that the state expects, the steps already dispatched after it
    change nothing either, and the state that is then saved is the one before the failure.
    """
    allowed_TxT = annealed_attention(cfg, batch_index)
    arm_steps, continued = cfg.diffusion.arm_steps, cfg.run.continued_steps
    # A part's rates count its batches where a part came before: that one may have taken fewer steps than batches.
    clock = jnp.where(arm_steps > 0, batch_index - arm_steps, state.step)
    length = cfg.run.steps - arm_steps
    if not isinstance(continued, int) or continued:  # else the program is that of runs without the field
        clock, length = state.step - continued, cfg.run.steps - continued
    learning_rate = optimizer.learning_rate(cfg.optim, length)(clock)
    optimize = optimizer.build(cfg.optim, lambda _: learning_rate)
    step_of_part = jnp.maximum(state.step - arm_steps, 0)
    before = bad_batches.start_history(state.guard, step_of_part)
    full = targets(cfg, batch, batch_index)
    (loss, sums), grads = loss_and_grads(cfg, state.params, full, allowed_TxT)
    levels = sums if full.source_B is None else sums[:, :LEVELS]
    grad_norm = optax.tree.norm(grads)
    trained, frozen = lora.split(cfg.model, state.params)
    updates, opt_state = optimize.update(grads, state.opt_state, trained)
    updates = jax.tree.map(lambda u: u * state.guard.lr_factor.astype(u.dtype), updates)  # linear in the learning rate
    params = lora.join(cast(Params, optax.apply_updates(trained, updates)), frozen)
    guard = bad_batches.after_step(before, grad_norm)
    stepped = TrainState(state.step + 1, state.next_index + 1, params, opt_state, guard)

    expected = batch_index == state.next_index
    bad = bad_batches.is_bad(cfg.safety, before, step_of_part, loss, grad_norm)
    applied = expected & ~bad
    skipped = expected & bad & (state.guard.skips < cfg.safety.max_skips)
    state_out = jax.tree.map(lambda new, old: jnp.where(applied, new, old), stepped, state)
    state_out = state_out.replace(
        next_index=state_out.next_index + skipped.astype(jnp.int32),
        guard=state_out.guard.replace(skips=state_out.guard.skips + skipped.astype(jnp.int32)),
    )
    metrics = {
        "loss": loss,
        "cross_entropy": levels[0].sum() / jnp.maximum(levels[1].sum(), 1.0),
        "grad_norm": grad_norm,
        "lr": learning_rate * state.guard.lr_factor,
        "applied": applied.astype(jnp.float32),
        "skipped": skipped.astype(jnp.float32),
    }
    metrics |= {"levels": levels} if cfg.objective == "mdm" else {}
    return state_out, metrics | ({} if full.source_B is None else {"sources": by_source(full, sums[0, LEVELS:])})


def by_source(full: Targets, loss_S: jax.Array) -> jax.Array:
    """Return the part of each source in the loss of a batch, and its part of what the loss is a mean over. (2, S).

    The first divided by the second is the loss of the rows of that source alone, in the unit of the whole loss.
    """
    assert full.source_B is not None and full.share_B is not None
    # After the loss, because XLA on CPUs does not order collectives that do not depend on each other.
    loss_S, share_B = jax.lax.optimization_barrier((loss_S, full.share_B))
    is_of_BxS = full.source_B[:, None] == jnp.arange(len(loss_S))[None]
    share_S = jnp.where(is_of_BxS, share_B[:, None], 0.0).sum(0)
    return constrain(jnp.stack([loss_S, share_S]), None, None)


def annealed_attention(cfg: Config, batch_index: jax.Array) -> jax.Array | None:
    """Return the positions that each may attend to while causal attention opens up, bool (T, T); None where it is full.

    On batch n of `anneal_steps` = N, counted from the end of `arm_steps`, each later position is open with probability
    min(1, (n + 1) / N): one draw for all rows, heads and layers of a step (DiffuLLaMA, arXiv 2410.17891, Section 3.2,
    and its released code).
    """
    if not cfg.diffusion.anneal_steps:
        return None
    opened = batch_index + 1 - cfg.diffusion.arm_steps
    fraction = jnp.minimum(1.0, opened / cfg.diffusion.anneal_steps)
    return annealed_mask(annealing_key(cfg.run.seed, batch_index), cfg.data.sequence_length, fraction)


def loss_and_grads(
    cfg: Config, params: Params, full: Targets, allowed_TxT: jax.Array | None = None
) -> tuple[tuple[jax.Array, jax.Array], Params]:
    """Return loss, unweighted sums and gradients of a global batch, in `cfg.run.microbatches` parts.

    The loss and the sums are those of `weighted_loss`.

    Weights are normalised over the whole batch beforehand, so the sum over parts does not depend on their number. The
    gradients are those of the parameters that are trained (`lora.split`).
    """
    A = cfg.run.microbatches
    parts = split_batch(cfg, full) if A > 1 else full
    cuts = cfg.objective == "mdm" and cfg.diffusion.random_length > 0
    segmented, share = cfg.data.packing != "chunk" or cuts, predicted_share(cfg)

    def loss(trained: Params, frozen: Params, part: Targets) -> tuple[jax.Array, jax.Array]:
        params = lora.join(trained, frozen)
        return weighted_loss(cfg, params, part, segmented=segmented, share=share, allowed_TxT=allowed_TxT)

    trained, frozen = lora.split(cfg.model, params)
    grad = jax.value_and_grad(loss, has_aux=True)
    if A == 1:
        return grad(trained, frozen, parts)

    def add(total: PyTree, part: Targets) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, grad(trained, frozen, part)), None

    groups = LEVELS + (0 if full.source_B is None else len(cfg.data.sources))
    zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.zeros((2, groups), jnp.float32)), trained))
    return jax.lax.scan(add, zeros, parts)[0]


def weighted_loss(
    cfg: Config,
    params: Params,
    part: Targets,
    *,
    segmented: bool,
    share: float,
    allowed_TxT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of weight * cross-entropy over (part of) a batch, and the unweighted sums by level of noise.

    Args:
      cfg: the run.
      params: of the model.
      part: targets of some rows.
      segmented: attention stays within segments.
      share: of all positions that is usually predicted, for the cross-entropy.
      allowed_TxT: bool, positions that each may attend to; None: all.

    Returns:
      The loss; and, float32 (2, LEVELS), nats and counts of the predicted labels of the rows at each level. Where rows
      know their source, a column for each source follows: its part of the loss, and its count.
    """
    model = Transformer(cfg.model)
    segment_ids_BxT = part.segment_ids_BxT if segmented else None
    # A packed example has the positions that it has alone, as when it is asked; documents count through the row.
    packed = cfg.data.packing == "packed_examples"
    positions_BxT = restarted(part.segment_ids_BxT) if packed else None
    hidden_BxTxD = model.apply(
        {"params": params}, part.inputs_BxT, segment_ids_BxT, positions_BxT, allowed_TxT=allowed_TxT
    )
    head_DxV = model.apply({"params": params}, method=Transformer.head_matrix)
    return weighted_cross_entropy(
        cast(jax.Array, hidden_BxTxD),
        cast(jax.Array, head_DxV),
        part.labels_BxT,
        part.weight_BxT,
        part.counted_BxT > 0,
        jnp.asarray(suppression_mask(cfg.model, cfg.suppressed_ids)),
        cfg.model.head_chunk,
        share,
        part.level_B,
        LEVELS,
        part.source_B,
        0 if part.source_B is None else len(cfg.data.sources),
    )


def split_batch(cfg: Config, full: Targets) -> Targets:
    """Return the A micro-batches of a global batch, stacked along a new first axis.

    Each micro-batch takes every A-th pair of rows, or row where the rows of a device are not a whole number of pairs
    for each: every device keeps the rows that it holds, and antithetic pairs stay together where they can.
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
    """Return sums over a held-out batch: nats of the bound, tokens and bytes that were scored, and `weighted_loss`'s.

    Tokens 1..T-1 of a canvas of T are scored given token 0, by both objectives, so that twins are comparable; with
    packing "segments" each document's first token is context instead. With "examples" answers are scored, with their
    EOS and without padding, given their prompts, on canvases that end there. Batch k holds records k * B to
    k * B + B - 1, and the noise of a record is fixed by (record, draw), so B and the mesh change the result by no more
    than rounding.
    """
    full, scored_BxT, labels_BxT = held_out_targets(cfg, batch, batch_index, draw)
    share = 1.0 if cfg.objective == "arm" else 0.5
    loss = functools.partial(weighted_loss, cfg, params, segmented=True, share=share)
    mean, levels = jax.tree.map(lambda x: x.sum(0), jax.lax.map(loss, split_batch(cfg, full)))
    # Counted after the network has run: XLA on CPUs does not order collectives that do not depend on each other, and
    # devices that meet them in another order wait for each other for ever.
    mean, scored_BxT, labels_BxT = jax.lax.optimization_barrier((mean, scored_BxT, labels_BxT))
    tokens = scored_BxT.sum()
    scored_bytes = jnp.where(scored_BxT > 0, token_bytes_V[labels_BxT], 0).sum()
    return {"nats": mean * tokens, "tokens": tokens, "bytes": scored_bytes, "levels": levels}
