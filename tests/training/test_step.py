"""The training step: equal numbers however the batch is cut, its definition, learning, and bad batches."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.slow_cases import slow_but
from support.tiny_step import (
    ALONE,
    CONFIGS,
    MDM,
    B,
    T,
    V,
    assert_same_gradients,
    four_rows,
    host_state,
    mesh_of,
    nll_of,
    one_step,
    placed_stepper,
    random_batch,
    run_step,
    targets_on,
)

from diffusionlm.training import step as train_step
from diffusionlm.training.state import abstract_state

# --- the same numbers however the batch is cut


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, microbatches",
    [((2, 4, 1), 4), *(pytest.param(sizes, 1, marks=pytest.mark.slow) for sizes in ((1, 8, 1), (8, 1, 1)))],
)
def test_meshes_and_micro_batches_change_only_the_order_of_sums(sizes, microbatches):
    """Loss and gradients of one batch; the noise is compared below."""
    mesh = mesh_of(sizes)
    cfg = dataclasses.replace(MDM, run=dataclasses.replace(MDM.run, microbatches=microbatches)).validate()
    params = jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), host_state("mdm").params, abstract_state(cfg, mesh).params
    )
    full = jax.device_put(targets_on(ALONE), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        compute = jax.jit(lambda p, t: train_step.loss_and_grads(cfg, p, t)).lower(params, full).compile()
        (loss, levels), grads = jax.device_get(compute(params, full))
    # Four rows a device are no whole pairs for each of four micro-batches, and yet no row leaves its device.
    assert "all-to-all" not in compute.as_text()
    state, metrics = one_step("mdm")
    assert loss == pytest.approx(metrics["loss"], rel=1e-5)
    np.testing.assert_allclose(levels, metrics["levels"], rtol=1e-5)
    assert levels[0].sum() == pytest.approx(metrics["cross_entropy"] * targets_on(ALONE).counted_BxT.sum(), rel=1e-5)
    norm = float(optax.tree.norm(grads))
    assert norm == pytest.approx(metrics["grad_norm"], rel=1e-5)
    # After one step from zero, the first moment is (1 - beta1) times the clipped gradient.
    moments = optax.tree.get(state.opt_state, "mu")
    assert_same_gradients(jax.tree.map(lambda m: m / 0.1 * max(norm, 1.0), moments), grads)


@pytest.mark.slow
def test_a_whole_step_on_a_mesh_of_all_three_axes_in_micro_batches():
    expected, expected_metrics = one_step("mdm")
    state, metrics = one_step("mdm", (2, 2, 2), 4)
    assert metrics["applied"] == 1 and state.step == state.next_index == 1
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5, atol=1e-7)
    assert_same_gradients(optax.tree.get(state.opt_state, "mu"), optax.tree.get(expected.opt_state, "mu"))
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-5)


def test_masks_are_the_same_to_the_bit_on_every_mesh():
    alone, split = targets_on(ALONE), targets_on((2, 2, 2))
    assert alone.counted_BxT.any() and (alone.segment_ids_BxT == 0).any()
    for name in ("inputs_BxT", "labels_BxT", "segment_ids_BxT", "counted_BxT"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(split, name))
    np.testing.assert_allclose(alone.weight_BxT, split.weight_BxT, rtol=1e-6)


# --- what a step computes


def test_the_mdm_loss_is_its_definition():
    """Weighted by 1/t over the masked, divided by the kept tokens of the batch; the metric beside it has no weights."""
    full = targets_on(ALONE)
    nll = nll_of("mdm", host_state("mdm").params, full.inputs_BxT, full.segment_ids_BxT, full.labels_BxT)
    masked, kept = full.inputs_BxT == V, full.segment_ids_BxT != 0  # no clean token is V
    np.testing.assert_array_equal(full.labels_BxT, random_batch()["tokens"][:, :T])
    np.testing.assert_array_equal(masked, full.counted_BxT)
    assert masked.any() and not (masked & ~kept).any()
    weight = full.weight_BxT * kept.sum()
    t = 1 / weight.max(1, where=masked, initial=1.0)
    np.testing.assert_allclose(weight, masked / t[:, None], rtol=1e-6)  # one t a row, on the masked alone
    pairs = t.reshape(-1, 2)[masked.any(1).reshape(-1, 2).all(1)]
    assert len(pairs) > 3
    np.testing.assert_allclose(pairs.sum(1), 1.0, rtol=1e-5)
    _, metrics = one_step("mdm")
    assert metrics["loss"] == pytest.approx((nll * weight).sum() / kept.sum(), rel=1e-5)
    assert metrics["cross_entropy"] == pytest.approx(nll[masked].mean(), rel=1e-5)
    by_hand = np.zeros((2, 10))  # by tenths of the kept tokens that are masked
    for row in range(B):
        level = min(10 * int(masked[row].sum()) // max(int(kept[row].sum()), 1), 9)
        by_hand[0, level] += nll[row][masked[row]].sum()
        by_hand[1, level] += masked[row].sum()
    assert (by_hand[1] > 0).sum() > 5
    np.testing.assert_allclose(metrics["levels"], by_hand, rtol=1e-5)


def test_the_arm_loss_is_its_definition():
    batch = random_batch()
    scored = batch["segment_ids"][:, 1:] != 0
    inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    nll = nll_of("arm", host_state("arm").params, inputs, np.ones((B, T), np.int32), labels)
    _, metrics = one_step("arm")
    assert metrics["loss"] == pytest.approx(nll[scored].mean(), rel=1e-5)
    assert metrics["cross_entropy"] == pytest.approx(nll[scored].mean(), rel=1e-5)


@pytest.mark.parametrize("objective", CONFIGS)
def test_a_step_says_what_it_did(objective):
    """The gradient norm before clipping, and the learning rate of this step, by steps taken and not by batches."""
    state, metrics = one_step(objective)
    clipped = float(optax.tree.norm(optax.tree.get(state.opt_state, "mu"))) / (1 - 0.9)
    assert clipped == pytest.approx(min(metrics["grad_norm"], 1.0), rel=1e-4)
    assert metrics["lr"] == 0.0
    later = host_state(objective).replace(step=np.int32(2), next_index=np.int32(7))
    state, metrics = run_step(objective, later, random_batch(), 7)
    assert metrics["lr"] == pytest.approx(0.02 * 2 / 4)
    assert (state.step, state.next_index) == (3, 8)


@pytest.mark.parametrize(
    ("objective", "packing"),
    slow_but(itertools.product(CONFIGS, ("chunk", "segments", "examples")), (("mdm", "examples"),)),
)
def test_no_dtype_is_promoted_by_accident(objective, packing):
    """Around everything that is ours; optax itself is not written for it."""
    cfg = CONFIGS[objective]
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, dtype="bfloat16"),
        data=dataclasses.replace(cfg.data, packing=packing),
        diffusion=dataclasses.replace(cfg.diffusion, normalization="examples" if packing == "examples" else "tokens"),
        run=dataclasses.replace(cfg.run, microbatches=4),
    )
    batch = jax.tree.map(jnp.asarray, random_batch())

    def step(params, batch, index):
        return train_step.loss_and_grads(cfg, params, train_step.targets(cfg, batch, index))

    def evaluate(params, batch, index):
        return train_step.eval_step(cfg, params, batch, jnp.ones(128, jnp.int32), index, index)

    with jax.numpy_dtype_promotion("strict"):
        (loss, _), grads = jax.eval_shape(step, host_state(objective).params, batch, jnp.int32(0))
        jax.eval_shape(evaluate, host_state(objective).params, batch, jnp.int32(0))
    assert loss.dtype == jnp.float32 and all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


# --- learning


def unigram_entropy(tokens: np.ndarray) -> float:
    share = np.bincount(tokens.ravel()) / tokens.size
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def learn(objective: str, steps: int) -> np.ndarray:
    mesh, step, place_state, place_batch = placed_stepper(objective, ALONE, 1)
    state, batch, losses = place_state(host_state(objective)), place_batch(four_rows()), []
    with jax.set_mesh(mesh):
        for i in range(steps):
            state, metrics = step(state, batch, jnp.int32(i))
            losses.append(metrics["loss"])
    assert int(state.step) == steps
    return np.array(losses)


@pytest.mark.slow
def test_an_arm_learns_one_batch_by_heart():
    """Given the first token of four records, which all differ, nothing is left to guess."""
    assert len({*four_rows()["tokens"][:4, 0]}) == 4
    losses = learn("arm", 150)
    assert losses[0] > 3 and losses[-5:].max() < 0.02


@pytest.mark.slow
def test_an_mdm_learns_one_batch():
    """Not all of it: the bound holds the log 4 nats of which record it is, and a canvas of nothing but masks, which
    looks the same from everywhere to rotary positions."""
    losses = learn("mdm", 250)
    entropy = unigram_entropy(four_rows()["tokens"][:, :T])
    assert losses[:5].mean() > entropy > 2.5
    assert math.log(4) / T < losses[-50:].mean() < entropy / 2


# --- bad batches


@pytest.mark.parametrize("objective", CONFIGS)
def test_a_batch_that_is_not_finite_changes_nothing_and_stops_the_steps_behind_it(objective):
    before, _ = one_step(objective)  # with moments that are not 0
    bad = random_batch()
    bad["tokens"][:] = 100  # a padding row of the vocabulary has no probability: an infinite loss
    after, metrics = run_step(objective, before, bad, 1)
    assert not np.isfinite(metrics["loss"]) and metrics["applied"] == 0
    chex.assert_trees_all_equal(after, before)
    # Already dispatched when the host learns of it: good data, but not the batch that the state is waiting for.
    behind, metrics = run_step(objective, after, random_batch(), 2)
    assert np.isfinite(metrics["loss"]) and metrics["applied"] == 0
    chex.assert_trees_all_equal(behind, before)
    # The bad batch can be left out by advancing next_index alone.
    onwards, metrics = run_step(objective, behind.replace(next_index=np.int32(2)), random_batch(), 2)
    assert metrics["applied"] == 1 and (onwards.step, onwards.next_index) == (2, 3)


def test_the_factor_of_roll_backs_scales_the_whole_step():
    before, _ = one_step("arm")  # with moments, and a learning rate that is not 0
    full, metrics = run_step("arm", before, random_batch(), 1)
    guard = before.guard.replace(lr_factor=np.float32(0.25))
    quarter, lowered = run_step("arm", before.replace(guard=guard), random_batch(), 1)
    assert lowered["lr"] == pytest.approx(metrics["lr"] / 4) and metrics["lr"] > 0
    moved = jax.tree.map(lambda a, b: a - b, full.params, before.params)
    found = jax.tree.map(lambda a, b: a - b, quarter.params, before.params)
    chex.assert_trees_all_close(found, jax.tree.map(lambda x: x / 4, moved), rtol=1e-3, atol=1e-7)
    chex.assert_trees_all_equal(quarter.opt_state, full.opt_state)  # the moments do not know of it


def test_a_gradient_that_is_not_finite_counts_as_bad_though_the_loss_is_fine():
    """A gain of 1e-30 before a head of 1e30: the same logits, but the gradient of the gain overflows when squared."""
    state, fine = host_state("arm"), one_step("arm")[1]
    params = {**state.params, "head": state.params["head"] * np.float32(1e30)}
    params["final_norm"] = {"scale": state.params["final_norm"]["scale"] * np.float32(1e-30)}
    before = state.replace(params=params)
    after, metrics = run_step("arm", before, random_batch(), 0)
    assert metrics["loss"] == pytest.approx(fine["loss"], rel=1e-4)
    assert not np.isfinite(metrics["grad_norm"]) and metrics["applied"] == 0
    chex.assert_trees_all_equal(after, before)
