"""AdamW and Muon from optax, with a learning-rate schedule, a weight-decay mask and clipping.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by a nearly orthogonal one with the
same singular vectors. It is for matrices that map the stream to something or back; the embedding, the head, norms,
biases and adapters keep AdamW. An update is scaled to a root mean square of 0.2, which is AdamW's in practice, so both
have comparable learning rates (Moonlight, arXiv 2502.16982, Eq. 4).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core.meta import AxisMetadata
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from diffusionlm.config import OptimConfig
from diffusionlm.tree_types import Params, PyTree


def learning_rate(cfg: OptimConfig, steps: int | jax.Array) -> optax.Schedule:
    """Return the learning rate of a step (0-based): linear warm-up from 0, then cosine, WSD or constant.

    WSD (warm-up, stable, decay) with `drop_step` is LLaDA's (arXiv 2502.09992, Section 2.2): hold the peak, drop once
    to `drop_lr`, and decay linearly to `final_lr` over the last `decay_steps`.

    The numbers may be arrays that are known only when the program runs; optax's own schedules compare them in Python
    and cannot be used.

    Args:
      cfg: the schedule.
      steps: its length.
    """

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)  # exact up to 2**24 steps
        after = jnp.float32(cfg.peak_lr)
        if cfg.schedule == "cosine":
            done = jnp.clip((step - cfg.warmup_steps) / jnp.maximum(steps - cfg.warmup_steps, 1), 0, 1)
            after = cfg.final_lr + (cfg.peak_lr - cfg.final_lr) * (1 + jnp.cos(jnp.pi * done)) / 2
        if cfg.schedule == "wsd":
            dropped = (jnp.asarray(cfg.drop_step) > 0) & (step >= cfg.drop_step)
            held = jnp.where(dropped, cfg.drop_lr, cfg.peak_lr)
            done = jnp.clip((step - (steps - cfg.decay_steps)) / jnp.maximum(cfg.decay_steps, 1), 0, 1)
            after = held + (cfg.final_lr - held) * done * (jnp.asarray(cfg.decay_steps) > 0)
        warming = cfg.peak_lr * step / jnp.maximum(cfg.warmup_steps, 1)
        return jnp.where(step < cfg.warmup_steps, warming, after).astype(jnp.float32)

    return rate


def decays(params: Params) -> PyTree:
    """Return a tree like `params`: True for matrices and embeddings, False for norm gains and biases."""
    return _by_name(params, lambda name: name != "scale" and not name.endswith("bias"))


def _by_name(params: PyTree, value: Callable[[str], Any]) -> PyTree:
    """Return a tree like `params`, whose leaves may be boxed, with a value for the name of each parameter."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, AxisMetadata)

    return jax.tree_util.tree_map_with_path(lambda path, _: value(path[-1].key), params, is_leaf=is_box)


# The axes of each matrix of a block that are multiplied with its input, and those of its output. The axis of layers
# stays out: each layer's matrix is orthogonal by itself.
_MATRICES = {
    "q": MuonDimensionNumbers(1, (2, 3)),
    "k": MuonDimensionNumbers(1, (2, 3)),
    "v": MuonDimensionNumbers(1, (2, 3)),
    "o": MuonDimensionNumbers((1, 2), 3),
    "up": MuonDimensionNumbers(1, 2),
    "gate": MuonDimensionNumbers(1, 2),
    "down": MuonDimensionNumbers(1, 2),
}
_SPLITTING = ("fsdp", "tensor")  # the axes of the mesh that split these matrices
_UPDATE_RMS = 0.2
_MOMENTUM = 0.95  # as Muon's authors have it; `beta1` is AdamW's


def build(cfg: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer with this learning rate; its moments have the shapes of the parameters."""
    decayed = decays if cfg.decay_mask == "matrices" else None
    optimizer: optax.GradientTransformation = optax.adamw(
        rate,
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        mu_dtype=cfg.first_moment_dtype,
        weight_decay=cfg.weight_decay,
        mask=decayed,
    )
    if cfg.name == "muon":
        # Not `optax.contrib.muon`, whose AdamW decays norms as well and uses Nesterov's momentum.
        orthogonal = scale_by_muon(
            beta=_MOMENTUM,
            mu_dtype=cfg.first_moment_dtype,
            weight_dimension_numbers=lambda updates: _by_name(updates, lambda name: _MATRICES[name]),
        )
        muon = optax.chain(
            _by_whole_layers(orthogonal),
            optax.stateless(lambda updates, _: _scaled(updates)),
            optax.add_decayed_weights(cfg.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        optimizer = optax.partition(
            {"muon": muon, "adamw": optimizer},
            lambda params: _by_name(params, lambda name: "muon" if name in _MATRICES else "adamw"),
        )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), optimizer) if cfg.clip_norm else optimizer


def _by_whole_layers(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Give each device of the mesh of `jax.set_mesh` whole layers of the stacks to orthogonalize.

    Left to itself, XLA gathers the parts of a split matrix in each iteration that orthogonalizes it. So the stacks are
    exchanged once before the iterations and once after; the momentum that is stored stays split as its parameter is.
    """

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None) -> tuple[PyTree, optax.OptState]:
        assert isinstance(state, MuonState)
        mesh = jax.sharding.get_abstract_mesh().shape
        axes = tuple(axis for axis in _SPLITTING if mesh.get(axis, 1) > 1)
        if not axes or not jax.tree.leaves(updates):  # adapters alone are no matrices of Muon's
            return muon.update(updates, state, params)
        layers = len(jax.tree.leaves(updates)[0])
        missing = -layers % math.prod(mesh[axis] for axis in axes)

        def pad(stack: jax.Array) -> jax.Array:  # with layers of zeros, so that the devices divide their number
            return by_first_axis(jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1)))

        def by_first_axis(stack: jax.Array) -> jax.Array:  # XLA exchanges over one axis at a time; for two it gathers
            return jax.lax.with_sharding_constraint(stack, P(axes[0], *[P.UNCONSTRAINED] * (stack.ndim - 1)))

        specs = P(axes), state._replace(count=P(), mu=P(axes), ns_coeffs=P())
        run: Any = jax.shard_map(lambda updates, state: muon.update(updates, state), in_specs=specs, out_specs=specs)
        updates, after = run(jax.tree.map(pad, updates), state._replace(mu=jax.tree.map(pad, state.mu)))
        updates, mu = jax.tree.map(lambda stack: by_first_axis(stack)[:layers], (updates, after.mu))
        return updates, after._replace(mu=mu)

    return optax.GradientTransformation(muon.init, update)


def _scaled(updates: PyTree) -> PyTree:
    """Give orthogonal matrices of shape m x n, whose root mean square is 1 / sqrt(max(m, n)), that of AdamW."""

    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        inputs, outputs = _MATRICES[path[-1].key]
        sides = [np.prod([update.shape[axis] for axis in np.atleast_1d(axes)]) for axes in (inputs, outputs)]
        return update * (_UPDATE_RMS * float(max(sides)) ** 0.5)

    return jax.tree_util.tree_map_with_path(scaled, updates)
