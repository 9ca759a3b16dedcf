"""The training and evaluation steps: the same numbers however the batch is cut, learning, bad batches, fair evaluation."""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special

from diffusionlm import train_step
from diffusionlm.config import Config, DataConfig, DiffusionConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.model import Transformer
from diffusionlm.sharding import global_array, local_rows, make_mesh
from diffusionlm.train_state import TrainState, abstract_state, init_state

B, T, V = 32, 8, 29
MDM = Config(
    objective="mdm",
    model=ModelConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=V, max_length=T, head_chunk=4
    ),
    diffusion=DiffusionConfig(random_length=0.3),
    # A large eps: Adam would otherwise blow up rounding errors of gradients near 0 to the size of a step.
    optim=OptimConfig(schedule="constant", peak_lr=0.02, warmup_steps=4, weight_decay=0.0, eps=1e-4),
    data=DataConfig(sequence_length=T, batch_size=B),
    run=RunConfig(steps=400, seed=1),
).validate()
ARM = dataclasses.replace(
    MDM, objective="arm", model=dataclasses.replace(MDM.model, causal=True, mask_row=False)
).validate()
CONFIGS = {"mdm": MDM, "arm": ARM}


def random_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Records of two documents and some padding."""
    rng = np.random.default_rng(seed)
    segments = np.ones((B, T + 1), np.int32)
    segments[::3, 4:] = 2
    segments[::5, 6:] = 0
    return {"tokens": rng.integers(0, V, (B, T + 1)).astype(np.int32), "segment_ids": segments}


def four_rows() -> dict[str, np.ndarray]:
    """Something to learn by heart: four records, eight times each."""
    tokens = np.tile(np.random.default_rng(1).integers(0, V, (4, T + 1)), (B // 4, 1)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}


@functools.cache
def mesh_of(sizes: tuple[int, int, int]):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


@functools.cache
def host_state(objective: str) -> TrainState:
    """A state with random parameters and zero moments, as numpy: compiling the initialisation takes longer."""
    cfg = CONFIGS[objective]
    shapes = jax.eval_shape(lambda: init_state(cfg, jax.random.key(0)))
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.25 * rng.normal(size=leaf.shape)).astype(np.float32)

    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    return zeros.replace(params=jax.tree_util.tree_map_with_path(draw, zeros.params))


@functools.cache
def stepper(objective: str, sizes: tuple[int, int, int], microbatches: int):
    """(host state, host batch, batch index) -> new state and metrics, through `make_train_step` on a mesh."""
    cfg, mesh = CONFIGS[objective], mesh_of(sizes)
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, microbatches=microbatches)).validate()
    step = train_step.make_train_step(cfg, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh))
    rows = local_rows(mesh, B)

    def run(state, batch, index):
        # A copy, as the step consumes the state that it is given.
        state = jax.tree.map(lambda x, s: jax.device_put(jnp.array(np.asarray(x)), s), state, shardings)
        on_mesh = {
            name: global_array(mesh, B, rows, np.concatenate([x[a:b] for a, b in rows])) for name, x in batch.items()
        }
        with jax.set_mesh(mesh):
            return step(state, on_mesh, jnp.int32(index))

    return run


ALONE = (1, 1, 1)


@functools.cache
def one_step(objective: str, sizes: tuple[int, int, int], microbatches: int):
    return stepper(objective, sizes, microbatches)(host_state(objective), random_batch(), 0)


# --- the same numbers however the batch is cut


@pytest.mark.parametrize(
    "objective, sizes, microbatches",
    [
        ("mdm", ALONE, 4),
        ("mdm", (1, 8, 1), 1),
        ("mdm", (8, 1, 1), 1),
        ("mdm", (2, 4, 1), 4),
        ("mdm", (2, 2, 2), 1),
        ("arm", (1, 2, 2), 4),
    ],
)
def test_meshes_and_micro_batches_change_only_the_order_of_sums(objective, sizes, microbatches):
    expected, expected_metrics = one_step(objective, ALONE, 1)
    state, metrics = one_step(objective, sizes, microbatches)
    assert metrics["applied"] == 1
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5, atol=1e-7)
    for moment, tolerance in (("mu", 1e-7), ("nu", 1e-9)):
        actual, wanted = (optax.tree.get(s.opt_state, moment) for s in (state, expected))
        chex.assert_trees_all_close(jax.device_get(actual), jax.device_get(wanted), rtol=1e-4, atol=tolerance)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(expected.params), rtol=1e-5, atol=1e-5)
    assert int(state.step) == int(state.next_index) == 1


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_masks_are_the_same_to_the_bit_on_every_mesh(sizes):
    batch = random_batch()

    def make(sizes, spec):
        mesh = mesh_of(sizes)
        placed = jax.device_put(batch, NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            return jax.device_get(jax.jit(lambda b, i: train_step.targets(MDM, b, i))(placed, jnp.int32(3)))

    alone, split = make(ALONE, PartitionSpec()), make(sizes, PartitionSpec(("data", "fsdp")))
    assert alone.counted_BxT.any() and (alone.segment_ids_BxT == 0).any()
    for name in ("inputs_BxT", "labels_BxT", "segment_ids_BxT", "counted_BxT"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(split, name))
    np.testing.assert_allclose(alone.weight_BxT, split.weight_BxT, rtol=1e-6)


# --- what a step computes


@functools.cache
def logits_of(objective: str):
    model = Transformer(CONFIGS[objective].model)

    def run(params, tokens, segments):
        hidden = model.apply({"params": params}, tokens, segments)
        return model.apply({"params": params}, hidden, method=Transformer.head)[..., :V]

    return jax.jit(run)


def nll_of(objective, params, inputs, segments, labels) -> np.ndarray:
    logits = np.asarray(logits_of(objective)(params, inputs, segments), np.float64)
    return special.logsumexp(logits, axis=-1) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


def test_the_mdm_loss_is_its_definition():
    """Weighted by 1/t over the masked, divided by the kept tokens of the batch; the metric beside it has no weights."""
    full = jax.device_get(jax.jit(lambda b: train_step.targets(MDM, b, jnp.int32(0)))(random_batch()))
    nll = nll_of("mdm", host_state("mdm").params, full.inputs_BxT, full.segment_ids_BxT, full.labels_BxT)
    masked = full.inputs_BxT == V  # no clean token is V
    kept = full.segment_ids_BxT != 0
    np.testing.assert_array_equal(full.labels_BxT, random_batch()["tokens"][:, :T])
    np.testing.assert_array_equal(masked, full.counted_BxT)
    assert not (masked & ~kept).any()
    times = (masked.sum(1, keepdims=True) / np.maximum(full.weight_BxT.max(1, keepdims=True), 1e-9) > 0) * 1.0
    weight = full.weight_BxT * kept.sum()  # 1/t again
    assert ((weight == 0) == ~masked).all() and (weight[masked] >= 1 - 1e-6).all() and times.max() == 1
    _, metrics = one_step("mdm", ALONE, 1)
    assert float(metrics["loss"]) == pytest.approx((nll * weight).sum() / kept.sum(), rel=1e-5)
    assert float(metrics["cross_entropy"]) == pytest.approx(nll[masked].mean(), rel=1e-5)


def test_the_arm_loss_is_its_definition():
    batch = random_batch()
    scored = batch["segment_ids"][:, 1:] != 0
    nll = nll_of(
        "arm", host_state("arm").params, batch["tokens"][:, :-1], np.ones((B, T), np.int32), batch["tokens"][:, 1:]
    )
    _, metrics = one_step("arm", ALONE, 1)
    assert float(metrics["loss"]) == pytest.approx(nll[scored].mean(), rel=1e-5)
    assert float(metrics["cross_entropy"]) == pytest.approx(nll[scored].mean(), rel=1e-5)


@pytest.mark.parametrize("objective", CONFIGS)
def test_a_step_says_what_it_did(objective):
    """The gradient norm before clipping, and the learning rate of this step, by steps taken and not by batches."""
    state, metrics = one_step(objective, ALONE, 1)
    clipped = float(optax.tree.norm(jax.device_get(optax.tree.get(state.opt_state, "mu")))) / (1 - 0.9)
    assert clipped == pytest.approx(min(float(metrics["grad_norm"]), 1.0), rel=1e-4)
    assert float(metrics["lr"]) == 0.0
    later = host_state(objective).replace(step=np.int32(2), next_index=np.int32(7))
    state, metrics = stepper(objective, ALONE, 1)(later, random_batch(), 7)
    assert float(metrics["lr"]) == pytest.approx(0.02 * 2 / 4)
    assert (int(state.step), int(state.next_index)) == (3, 8)


@pytest.mark.parametrize("packing", ["chunk", "segments"])
@pytest.mark.parametrize("objective", CONFIGS)
def test_no_dtype_is_promoted_by_accident(objective, packing):
    """Around everything that is ours; optax itself is not written for it."""
    cfg = CONFIGS[objective]
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, dtype="bfloat16"),
        data=dataclasses.replace(cfg.data, packing=packing),
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


@functools.cache
def trained(objective: str, steps: int):
    cfg, mesh = CONFIGS[objective], mesh_of(ALONE)
    step = train_step.make_train_step(cfg, mesh)
    batch = jax.tree.map(jnp.asarray, four_rows())
    state = jax.tree.map(jnp.array, host_state(objective))
    losses = []
    with jax.set_mesh(mesh):
        for i in range(steps):
            state, metrics = step(state, batch, jnp.int32(i))
            losses.append(metrics["loss"])
    return np.array(losses), state


def test_an_arm_learns_one_batch_by_heart():
    """Given the first token of four known records (all different), nothing is left to guess."""
    batch = four_rows()
    assert len({*batch["tokens"][:4, 0]}) == 4
    losses, state = trained("arm", 200)
    assert losses[0] > 3 and losses[-5:].max() < 0.02
    assert int(state.step) == 200


def test_an_mdm_learns_one_batch_down_to_which_record_it_is():
    """The bound cannot fall below the log 4 nats of which of the four records it is, over T tokens."""
    losses, _ = trained("mdm", 400)
    entropy, floor = unigram_entropy(four_rows()["tokens"][:, :T]), math.log(4) / T
    assert entropy > 2.5 and losses[:5].mean() > entropy
    assert floor * 0.8 < losses[-50:].mean() < entropy / 4


# --- bad batches


@pytest.mark.parametrize("objective", CONFIGS)
def test_a_batch_that_is_not_finite_changes_nothing_and_stops_the_steps_behind_it(objective):
    step = stepper(objective, ALONE, 1)
    before = jax.device_get(one_step(objective, ALONE, 1)[0])  # with moments that are not 0
    bad = random_batch()
    bad["tokens"][:, :] = 100  # a padding row of the vocabulary has no probability: an infinite loss
    after, metrics = step(before, bad, 1)
    assert not np.isfinite(metrics["loss"]) and metrics["applied"] == 0
    chex.assert_trees_all_equal(jax.device_get(after), before)
    # Already dispatched when the host learns of it: good data, but not the batch that the state is waiting for.
    behind, metrics = step(jax.device_get(after), random_batch(), 2)
    assert np.isfinite(metrics["loss"]) and metrics["applied"] == 0
    chex.assert_trees_all_equal(jax.device_get(behind), before)
    # The trainer may go on past the bad batch by advancing next_index alone.
    skipped = jax.device_get(behind).replace(next_index=np.int32(2))
    onwards, metrics = step(skipped, random_batch(), 2)
    assert metrics["applied"] == 1 and (int(onwards.step), int(onwards.next_index)) == (2, 3)


def test_a_gradient_that_is_not_finite_counts_as_bad_too():
    """A parameter so large that the loss is still a number and its gradient is not would otherwise spoil the moments."""
    state = jax.device_get(host_state("arm"))
    params = {**state.params, "final_norm": {"scale": np.full_like(state.params["final_norm"]["scale"], 0.0)}}
    params["head"] = np.full_like(params["head"], np.inf)
    after, metrics = stepper("arm", ALONE, 1)(state.replace(params=params), random_batch(), 0)
    assert metrics["applied"] == 0 and int(after.next_index) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(after.opt_state)))


# --- evaluation


BYTES = np.random.default_rng(3).integers(1, 9, 128).astype(np.int32)


@functools.cache
def evaluator(objective: str, packing: str = "chunk"):
    cfg = CONFIGS[objective]
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packing=packing))
    step = train_step.make_eval_step(cfg)

    def run(batch, index=0, draw=0, params=None, mesh=None):
        params = host_state(objective).params if params is None else params
        with jax.set_mesh(mesh or mesh_of(ALONE)):
            out = step(params, batch, jnp.asarray(BYTES), jnp.int32(index), jnp.int32(draw))
        return {name: float(x) for name, x in out.items()}

    return run


@pytest.mark.parametrize("packing", ["chunk", "segments"])
def test_twins_are_scored_on_the_same_tokens_and_bytes(packing):
    """Tokens 1 to T-1 of a canvas of T, padding excepted, given token 0."""
    batch = random_batch()
    arm, mdm = (evaluator(objective, packing)(batch) for objective in ("arm", "mdm"))
    assert (arm["tokens"], arm["bytes"]) == (mdm["tokens"], mdm["bytes"])
    if packing == "chunk":
        scored = batch["segment_ids"][:, 1:T] != 0
        assert mdm["tokens"] == scored.sum()
        assert mdm["bytes"] == BYTES[batch["tokens"][:, 1:T]][scored].sum()


def test_the_arm_evaluation_is_its_definition():
    batch = random_batch()
    segments = (batch["segment_ids"][:, : T - 1] != 0).astype(np.int32)
    nll = nll_of("arm", host_state("arm").params, batch["tokens"][:, : T - 1], segments, batch["tokens"][:, 1:T])
    assert evaluator("arm")(batch)["nats"] == pytest.approx(nll[batch["segment_ids"][:, 1:T] != 0].sum(), rel=1e-5)


def test_the_mdm_evaluation_estimates_the_bound():
    """Against all masks of the T-1 tokens after the first: n uniform, each subset of n alike, weight (T-1)/n."""
    clean = four_rows()["tokens"][0]
    masks = np.array([m for m in itertools.product([False, True], repeat=T - 1) if any(m)])
    noisy = np.tile(clean[:T], (len(masks), 1))
    noisy[:, 1:][masks] = V
    labels = np.tile(clean[:T], (len(masks), 1))
    nll = nll_of("mdm", host_state("mdm").params, noisy, np.ones_like(noisy), labels)[:, 1:]
    sizes = masks.sum(1)
    law = 1 / ((T - 1) * special.comb(T - 1, sizes))
    assert law.sum() == pytest.approx(1)
    bound = (law * (T - 1) / sizes * (nll * masks).sum(1)).sum()
    batch = {"tokens": np.tile(clean, (B, 1)), "segment_ids": np.ones((B, T + 1), np.int32)}
    draws = np.array([evaluator("mdm")(batch, draw=d)["nats"] / B for d in range(60)])
    error = draws.std(ddof=1) / math.sqrt(len(draws))
    assert error < 0.01 * bound
    assert abs(draws.mean() - bound) < 4 * error


def test_evaluation_noise_is_that_of_batch_and_draw():
    batch, run = random_batch(), evaluator("mdm")
    first = run(batch, 2, 1)
    assert first == run(batch, 2, 1)
    others = [run(batch, 2, 0)["nats"], run(batch, 1, 1)["nats"], run(batch, 1, 2)["nats"]]
    assert len({first["nats"], *others}) == 4


def test_evaluation_does_not_look_at_how_the_model_was_trained():
    """Another seed, schedule or normalisation: the very same program."""

    def program(cfg):
        arguments = (host_state("mdm").params, random_batch(), BYTES, np.int32(0), np.int32(0))
        return str(jax.make_jaxpr(lambda *x: train_step.eval_step(cfg, *x))(*arguments))

    other = dataclasses.replace(
        MDM,
        diffusion=DiffusionConfig(schedule="cosine", normalization="masked_tokens", time_sampling="iid"),
        run=dataclasses.replace(MDM.run, seed=9, microbatches=4),
    )
    assert program(MDM) == program(other)


@pytest.mark.parametrize("objective", CONFIGS)
def test_rows_add_up(objective):
    """Half of the rows as padding, then the other half: sums and noise of a row do not depend on the others."""
    batch, run = random_batch(), evaluator(objective)
    halves = []
    for kept in (np.arange(B) % 3 == 0, np.arange(B) % 3 != 0):
        segments = np.where(kept[:, None], batch["segment_ids"], 0)
        tokens = np.where(kept[:, None], batch["tokens"], 0)
        halves.append(run({"tokens": tokens, "segment_ids": segments}))
    whole = run(batch)
    for name in ("nats", "tokens", "bytes"):
        assert halves[0][name] + halves[1][name] == pytest.approx(whole[name], rel=1e-5), name


def test_the_mesh_does_not_change_the_evaluation():
    mesh = mesh_of((2, 2, 2))
    batch = jax.device_put(random_batch(), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(MDM, mesh)).params
    params = jax.device_put(host_state("mdm").params, shardings)
    assert evaluator("mdm")(batch, 3, 1, params, mesh) == pytest.approx(
        evaluator("mdm")(random_batch(), 3, 1), rel=1e-5
    )


def test_an_empty_batch_scores_nothing():
    empty = {"tokens": np.zeros((B, T + 1), np.int32), "segment_ids": np.zeros((B, T + 1), np.int32)}
    for objective in CONFIGS:
        assert evaluator(objective)(empty) == {"nats": 0.0, "tokens": 0.0, "bytes": 0.0}


def test_parameters_are_unboxed():
    assert not any(isinstance(x, nn.LogicallyPartitioned) for x in jax.tree.leaves(host_state("mdm").params))
