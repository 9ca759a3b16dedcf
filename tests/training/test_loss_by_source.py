"""The loss of each source of a mixture, which the step sums on the devices, is that of its rows alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.slow_cases import slow_but
from support.tiny_step import ALONE, CONFIGS, MDM, B, T, host_state, mesh_of, nll_of, random_batch

from diffusionlm import config_mixture
from diffusionlm.config import DiffusionConfig
from diffusionlm.diffusion.corruption import corrupt
from diffusionlm.diffusion.objectives import mdm_targets, row_shares
from diffusionlm.parallel.mesh import global_array, local_rows
from diffusionlm.training import programs
from diffusionlm.training import step as train_step
from diffusionlm.training.metrics import by_source
from diffusionlm.training.state import abstract_state

SOURCES = 3


def mixed(objective, microbatches=1):
    cfg = CONFIGS[objective]
    data = dataclasses.replace(cfg.data, mixture=config_mixture.of_size(SOURCES))
    return dataclasses.replace(cfg, data=data, run=dataclasses.replace(cfg.run, microbatches=microbatches)).validate()


def batch():
    """Rows of three sources, of which the last has none."""
    return random_batch() | {"source": (np.arange(B) % 3 == 0).astype(np.int32)}


@functools.cache
def step(objective, sizes=ALONE, microbatches=1):
    cfg, mesh = mixed(objective, microbatches), mesh_of(sizes)
    rows = local_rows(mesh, B)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh))
    state = jax.tree.map(lambda x, s: jax.device_put(jnp.array(x), s), host_state(objective), shardings)
    packed = {name: np.concatenate([x[start:stop] for start, stop in rows]) for name, x in batch().items()}
    with jax.set_mesh(mesh):
        placed = {name: global_array(mesh, B, rows, x) for name, x in packed.items()}
        return jax.device_get(programs.make_train_step(cfg, mesh)(state, placed, np.int32(0)))


@functools.cache
def by_hand(objective):
    """The losses of the sources, from logits, and the part of the scored tokens that each has."""
    cfg = mixed(objective)
    full = jax.device_get(jax.jit(lambda b: train_step.targets(cfg, b, jnp.int32(0)))(batch()))
    segments = full.segment_ids_BxT if objective == "mdm" else np.ones((B, T), np.int32)
    nll = nll_of(objective, host_state(objective).params, full.inputs_BxT, segments, full.labels_BxT)
    scored = full.counted_BxT > 0 if objective == "arm" else full.segment_ids_BxT != 0  # what is left of a cut row
    weight = np.where(full.counted_BxT > 0, full.weight_BxT.astype(np.float64) * scored.sum(), 0.0)
    losses, parts = np.full(SOURCES, np.nan), np.zeros(SOURCES)
    for source in range(SOURCES - 1):
        rows = batch()["source"] == source
        losses[source] = (weight * nll)[rows].sum() / scored[rows].sum()
        parts[source] = scored[rows].sum() / scored.sum()
    return losses, parts


@pytest.mark.parametrize(
    ("objective", "sizes", "microbatches"),
    slow_but(
        [("mdm", ALONE, 1), ("arm", ALONE, 1), ("mdm", ALONE, 4), ("mdm", (2, 2, 2), 2), ("arm", (2, 4, 1), 1)],
        [("mdm", ALONE, 1)],
    ),
)
def test_the_loss_of_a_source_is_that_of_its_rows_alone(objective, sizes, microbatches):
    _, metrics = step(objective, sizes, microbatches)
    losses, parts = by_hand(objective)
    loss_S, share_S = metrics["sources"]
    np.testing.assert_allclose(share_S, parts, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loss_S[:2] / share_S[:2], losses[:2], rtol=1e-4)
    assert loss_S[2] == share_S[2] == 0  # nothing came from it
    assert loss_S.sum() == pytest.approx(metrics["loss"], rel=1e-5)
    assert by_source("abc", metrics["sources"]) == pytest.approx({"loss/a": losses[0], "loss/b": losses[1]}, rel=1e-4)


@pytest.mark.slow
def test_the_labels_of_rows_change_nothing_else():
    """The numbers of a step are those of the program without them."""
    state, metrics = step("mdm")
    rows = {name: x for name, x in batch().items() if name != "source"}
    with jax.set_mesh(mesh_of(ALONE)):
        before = jax.tree.map(jnp.array, host_state("mdm"))
        plain, wanted = jax.device_get(programs.make_train_step(MDM, mesh_of(ALONE))(before, rows, np.int32(0)))
    assert set(metrics) - set(wanted) == {"sources"} and metrics["levels"].shape == wanted["levels"].shape
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    for found, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": "tokens"},
        {"normalization": "masked_tokens"},
        {"normalization": "examples"},
        {"weighting": "cart"},
        {"alignment": "shifted"},
    ],
    ids=str,
)
def test_shares_of_rows_undo_the_normalisation_over_the_batch(changes):
    """Divided by the sum of their shares, the weights of some rows are those that they have as a batch."""
    cfg = DiffusionConfig(random_length=0.4, **changes)
    tokens, segments = (jnp.asarray(random_batch()[name][:, :T]) for name in ("tokens", "segment_ids"))
    corrupted = corrupt(cfg, 29, tokens, segments, jnp.ones(tokens.shape, bool), jax.random.key(3))
    share_B = np.asarray(row_shares(cfg, corrupted))
    assert share_B.sum() == pytest.approx(1.0, rel=1e-5)
    weight_BxT = np.asarray(mdm_targets(cfg, tokens, corrupted).weight_BxT)
    rows = np.arange(B) % 3 == 0
    alone = mdm_targets(cfg, tokens[rows], jax.tree.map(lambda x: x[rows], corrupted))
    np.testing.assert_allclose(weight_BxT[rows] / share_B[rows].sum(), alone.weight_BxT, rtol=1e-4)
