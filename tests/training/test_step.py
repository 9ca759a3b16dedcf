"""The training and evaluation steps: equal numbers however the batch is cut, learning, bad batches, fair evaluation."""

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
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special

from diffusionlm.config import Config, DataConfig, DiffusionConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import global_array, local_rows, make_mesh
from diffusionlm.training import programs
from diffusionlm.training import step as train_step
from diffusionlm.training.bad_batches import new_guard
from diffusionlm.training.state import TrainState, abstract_state, init_state

B, T, V = 32, 8, 29
MDM = Config(
    objective="mdm",
    model=ModelConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=V, max_length=T, head_chunk=12
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


ALONE = (1, 1, 1)


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
    params = jax.tree_util.tree_map_with_path(draw, zeros.params)
    return zeros.replace(params=params, guard=jax.device_get(new_guard()))


@functools.cache
def placed_stepper(objective: str, sizes: tuple[int, int, int], microbatches: int):
    """`make_train_step` on a mesh, and the functions that put a host state and a host batch there."""
    cfg, mesh = CONFIGS[objective], mesh_of(sizes)
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, microbatches=microbatches)).validate()
    step = programs.make_train_step(cfg, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh))
    rows = local_rows(mesh, B)

    def place_state(state):  # a copy, as the step consumes the state that it is given
        return jax.tree.map(lambda x, s: jax.device_put(jnp.array(np.asarray(x)), s), state, shardings)

    def place_batch(batch):
        packed = {name: np.concatenate([x[start:stop] for start, stop in rows]) for name, x in batch.items()}
        return {name: global_array(mesh, B, rows, x) for name, x in packed.items()}

    return mesh, step, place_state, place_batch


def run_step(objective, state, batch, index, sizes=ALONE, microbatches=1):
    mesh, step, place_state, place_batch = placed_stepper(objective, sizes, microbatches)
    with jax.set_mesh(mesh):
        return jax.device_get(step(place_state(state), place_batch(batch), jnp.int32(index)))


@functools.cache
def one_step(objective: str, sizes: tuple[int, int, int] = ALONE, microbatches: int = 1):
    return run_step(objective, host_state(objective), random_batch(), 0, sizes, microbatches)


@functools.cache
def targets_on(sizes: tuple[int, int, int]):
    mesh = mesh_of(sizes)
    batch = jax.device_put(random_batch(), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(lambda b: train_step.targets(MDM, b, jnp.int32(0)))(batch))


# --- the same numbers however the batch is cut


def assert_same_gradients(actual, wanted):
    chex.assert_trees_all_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes, microbatches", [((1, 8, 1), 1), ((8, 1, 1), 1), ((2, 4, 1), 4)])
def test_meshes_and_micro_batches_change_only_the_order_of_sums(sizes, microbatches):
    """Loss and gradients of one batch; the noise is compared below."""
    mesh = mesh_of(sizes)
    cfg = dataclasses.replace(MDM, run=dataclasses.replace(MDM.run, microbatches=microbatches)).validate()
    params = jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), host_state("mdm").params, abstract_state(cfg, mesh).params
    )
    full = jax.device_put(targets_on(ALONE), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        compute = jax.jit(lambda p, t: train_step.loss_and_grads(cfg, p, t))
        (loss, unweighted), grads = jax.device_get(compute(params, full))
    state, metrics = one_step("mdm")
    assert loss == pytest.approx(metrics["loss"], rel=1e-5)
    assert unweighted == pytest.approx(metrics["cross_entropy"] * targets_on(ALONE).counted_BxT.sum(), rel=1e-5)
    norm = float(optax.tree.norm(grads))
    assert norm == pytest.approx(metrics["grad_norm"], rel=1e-5)
    # After one step from zero, the first moment is (1 - beta1) times the clipped gradient.
    moments = optax.tree.get(state.opt_state, "mu")
    assert_same_gradients(jax.tree.map(lambda m: m / 0.1 * max(norm, 1.0), moments), grads)


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


@pytest.mark.parametrize("packing", ["chunk", "segments", "examples"])
@pytest.mark.parametrize("objective", CONFIGS)
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


# --- prompts and answers


def examples_of(objective: str, pad_group: int = 0, **changes) -> Config:
    cfg = CONFIGS[objective]
    diffusion = dataclasses.replace(cfg.diffusion, random_length=0.0, normalization="examples")
    run = dataclasses.replace(cfg.run, **changes)
    data = dataclasses.replace(cfg.data, packing="examples", pad_group=pad_group)
    return dataclasses.replace(cfg, diffusion=diffusion, data=data, run=run).validate()


EOS = 3
LONGEST = 7  # of the T = 8 tokens that a model sees


def example_batch() -> dict[str, np.ndarray]:
    """Prompts of 1 to 4 tokens, answers of 1 to 3 with their EOS; only one example is the longest."""
    rng = np.random.default_rng(5)
    tokens = np.full((B, T + 1), EOS, np.int32)
    parts = np.zeros((B, T + 1), np.int32)
    for row in range(B):
        prompt, answer = (4, 3) if row == 19 else (rng.integers(1, 4), rng.integers(1, 4))
        tokens[row, : prompt + answer - 1] = rng.integers(4, V, prompt + answer - 1)
        parts[row, :prompt], parts[row, prompt : prompt + answer] = 1, 2
    assert ((parts != 0).sum(1) == LONGEST).sum() == 1
    return {"tokens": tokens, "segment_ids": parts}


@functools.cache
def example_targets(objective: str, sizes: tuple[int, int, int] = ALONE, index: int = 0, pad_group: int = 0):
    mesh, cfg = mesh_of(sizes), examples_of(objective, pad_group)
    batch = jax.device_put(example_batch(), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(lambda b, i: train_step.targets(cfg, b, i))(batch, jnp.int32(index)))


def test_a_prompt_is_never_masked_and_an_answer_s_padding_is():
    """Up to the longest example of the batch; nothing attends to what is behind it, and nothing is learnt there."""
    parts = example_batch()["segment_ids"][:, :T]
    masked = np.zeros(parts.shape, bool)
    for index in range(12):
        full = example_targets("mdm", index=index)
        np.testing.assert_array_equal(full.segment_ids_BxT, np.tile(np.arange(T) < LONGEST, (B, 1)))
        here = full.inputs_BxT == V  # no clean token is V
        np.testing.assert_array_equal(here, full.counted_BxT)
        np.testing.assert_array_equal(full.inputs_BxT[~here], example_batch()["tokens"][:, :T][~here])
        masked |= here
    assert not masked[parts == 1].any() and not masked[:, LONGEST:].any()
    assert masked[:, :LONGEST][parts[:, :LONGEST] != 1].all()


def test_the_fine_tuning_loss_is_its_definition():
    """LLaDA, Algorithm 2: the mean over examples of 1 / (t L') times what the masked tokens of the answer cost."""
    full = example_targets("mdm")
    params, parts = host_state("mdm").params, example_batch()["segment_ids"][:, :T]
    cfg = examples_of("mdm")
    loss = jax.jit(lambda p, t: train_step.loss_and_grads(cfg, p, t)[0][0])(params, jax.tree.map(jnp.asarray, full))
    nll = nll_of("mdm", params, full.inputs_BxT, full.segment_ids_BxT, full.labels_BxT)
    masked, times, expected = full.inputs_BxT == V, np.ones(B), 0.0
    for row in range(B):
        answer = [i for i in range(LONGEST) if parts[row, i] != 1]
        if masked[row].any():
            times[row] = 1 / (full.weight_BxT[row].max() * len(answer) * B)
        expected += sum(nll[row, i] for i in answer if masked[row, i]) / (times[row] * len(answer)) / B
    assert loss == pytest.approx(expected, rel=1e-5)
    pairs = times.reshape(-1, 2)[masked.any(1).reshape(-1, 2).all(1)]
    assert len(pairs) > 3
    np.testing.assert_allclose(pairs.sum(1), 1.0, rtol=1e-5)


def test_the_fine_tuning_loss_of_an_arm_is_its_definition():
    batch = example_batch()
    inputs, labels, parts = batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["segment_ids"][:, 1:]
    params = host_state("arm").params
    cfg, full = examples_of("arm"), example_targets("arm")
    loss = jax.jit(lambda p, t: train_step.loss_and_grads(cfg, p, t)[0][0])(params, jax.tree.map(jnp.asarray, full))
    nll = nll_of("arm", params, inputs, np.ones((B, T), np.int32), labels)
    expected = np.mean([nll[row][parts[row] == 2].mean() for row in range(B)])
    assert loss == pytest.approx(expected, rel=1e-5)
    ends = (labels == EOS) & (full.counted_BxT > 0)
    np.testing.assert_array_equal(ends.sum(1), 1)  # one EOS each


@pytest.mark.parametrize("objective", CONFIGS)
@pytest.mark.parametrize(
    "sizes, microbatches, pad_group",
    [((1, 8, 1), 1, 0), pytest.param((2, 2, 2), 4, 0, marks=pytest.mark.slow), ((2, 2, 2), 4, 2)],
)
def test_examples_on_meshes_and_in_micro_batches(objective, sizes, microbatches, pad_group):
    """The longest example of the batch is on one device, and counts for all that are padded with it."""
    alone = example_targets(objective, pad_group=pad_group)
    split = example_targets(objective, sizes, pad_group=pad_group)
    for name in ("inputs_BxT", "labels_BxT", "segment_ids_BxT", "counted_BxT"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(split, name))
    np.testing.assert_allclose(alone.weight_BxT, split.weight_BxT, rtol=1e-6)
    found = {}
    for where, parts in ((ALONE, 1), (sizes, microbatches)):
        cfg, mesh = examples_of(objective, pad_group, microbatches=parts), mesh_of(where)
        shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh).params)
        params = jax.device_put(host_state(objective).params, shardings)
        full = jax.device_put(alone, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        with jax.set_mesh(mesh):
            compute = jax.jit(lambda p, t, cfg=cfg: train_step.loss_and_grads(cfg, p, t))
            found[where] = jax.device_get(compute(params, full))
    chex.assert_trees_all_close(found[sizes][0], found[ALONE][0], rtol=1e-5)
    assert_same_gradients(found[sizes][1], found[ALONE][1])


def test_rows_are_padded_with_their_mate_alone():
    """data.pad_group=2: consecutive rows of the global batch, whatever is in the others, and with the same noise."""
    lengths = (example_batch()["segment_ids"][:, :T] != 0).sum(1)
    longest = np.repeat(lengths.reshape(-1, 2).max(1), 2)
    assert len(set(longest)) > 2
    whole, pairs = example_targets("mdm"), example_targets("mdm", pad_group=2)
    np.testing.assert_array_equal(pairs.segment_ids_BxT, np.arange(T)[None] < longest[:, None])
    seen = pairs.segment_ids_BxT != 0
    # The same noise: a position is masked or not, whether there is more padding behind it or not.
    np.testing.assert_array_equal(pairs.counted_BxT, whole.counted_BxT * seen)
    answers = (example_batch()["segment_ids"][:, :T] != 1) & seen
    scored = {"pairs": answers.sum(1), "whole": (example_batch()["segment_ids"][:, :LONGEST] != 1).sum(1)}
    both = (pairs.counted_BxT * whole.counted_BxT) > 0
    ratio = pairs.weight_BxT[both] / whole.weight_BxT[both]
    np.testing.assert_allclose(ratio, np.repeat((scored["whole"] / scored["pairs"])[:, None], T, 1)[both], rtol=1e-5)


@pytest.mark.parametrize("objective", CONFIGS)
def test_what_lies_behind_the_longest_example_changes_nothing(objective):
    """Neither its tokens nor its length: the rows at the end of longer records cost what they cost without it."""
    cfg, params = examples_of(objective), host_state(objective).params

    def loss(full):
        return float(jax.jit(lambda p, t: train_step.loss_and_grads(cfg, p, t)[0][0])(params, full))

    def targets(batch):
        return jax.tree.map(jnp.asarray, train_step.targets(cfg, batch, 0))

    batch, other = example_batch(), example_batch()
    other["tokens"][:, LONGEST:] = 11
    assert loss(targets(other)) == pytest.approx(loss(targets(batch)), rel=1e-6)
    if objective == "arm":
        other["tokens"][other["segment_ids"] == 0] = 11
        assert loss(targets(other)) == pytest.approx(loss(targets(batch)), rel=1e-6)
    # Noise is drawn for a canvas, so the same masks are put on the longer one.
    found = targets(batch)
    beyond = {"inputs_BxT": 11, "labels_BxT": 11, "segment_ids_BxT": 0, "weight_BxT": 0, "counted_BxT": 0}
    longer = {
        name: jnp.pad(getattr(found, name), ((0, 0), (0, 8)), constant_values=fill) for name, fill in beyond.items()
    }
    assert loss(dataclasses.replace(found, **longer)) == pytest.approx(loss(found), rel=1e-5)
    padded = {
        "tokens": np.pad(batch["tokens"], ((0, 0), (0, 8)), constant_values=EOS),
        "segment_ids": np.pad(batch["segment_ids"], ((0, 0), (0, 8))),
    }
    wide = targets(padded)
    np.testing.assert_array_equal(wide.segment_ids_BxT[:, : T - 1], found.segment_ids_BxT[:, : T - 1])
    if objective == "mdm":
        assert not np.asarray(wide.segment_ids_BxT)[:, LONGEST:].any()
    assert not np.asarray(wide.counted_BxT)[:, LONGEST:].any()
    assert wide.counted_BxT.shape == (B, T + 8)
    if objective == "arm":  # no noise: the loss of the padded batch itself
        assert loss(wide) == pytest.approx(loss(found), rel=1e-5)


@pytest.mark.parametrize("objective", CONFIGS)
def test_held_out_answers_are_scored_without_padding_on_canvases_of_their_own(objective):
    """So the number does not depend on batch mates, and twins score the same tokens."""
    cfg, params = examples_of(objective), host_state(objective).params
    compiled = jax.jit(lambda b: train_step.eval_step(cfg, params, b, jnp.ones(128, jnp.int32), 0, 0))

    def evaluate(batch):
        return {name: float(value) for name, value in compiled(batch).items()}

    batch = example_batch()
    batch["tokens"][-1], batch["segment_ids"][-1] = 0, 0  # what fills the last batch up
    found = evaluate(batch)
    assert found["tokens"] == (batch["segment_ids"] == 2).sum()
    assert found["bytes"] == found["tokens"]
    other = {name: values.copy() for name, values in batch.items()}
    other["tokens"][batch["segment_ids"] == 0] = 11
    other["tokens"][19], other["segment_ids"][19] = batch["tokens"][0], batch["segment_ids"][0]
    mates = evaluate(other)
    swapped = (batch["segment_ids"][19] == 2).sum() - (batch["segment_ids"][0] == 2).sum()
    assert found["tokens"] - mates["tokens"] == swapped
    if objective == "arm":
        nll = nll_of("arm", params, batch["tokens"][:, :-1], np.ones((B, T), np.int32), batch["tokens"][:, 1:])
        assert found["nats"] == pytest.approx(nll[batch["segment_ids"][:, 1:] == 2].sum(), rel=1e-5)
    only = {name: values.copy() for name, values in batch.items()}
    only["segment_ids"][1:] = 0
    first = {name: values.copy() for name, values in other.items()}
    first["segment_ids"][1:] = 0
    assert evaluate(only)["nats"] == pytest.approx(evaluate(first)["nats"], rel=1e-6)


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


def test_an_arm_learns_one_batch_by_heart():
    """Given the first token of four records, which all differ, nothing is left to guess."""
    assert len({*four_rows()["tokens"][:4, 0]}) == 4
    losses = learn("arm", 150)
    assert losses[0] > 3 and losses[-5:].max() < 0.02


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


def test_text_may_contain_a_mask_id_that_is_also_a_word():
    """DiffuLLaMA masks with an ordinary id. Where the text itself holds it, nothing is predicted or scored."""
    word = 7
    cfg = dataclasses.replace(
        MDM,
        model=dataclasses.replace(MDM.model, mask_row=False),
        diffusion=DiffusionConfig(mask_id=word),
        run=dataclasses.replace(MDM.run, microbatches=2),
    ).validate()
    batch = random_batch()
    padding = batch["segment_ids"][:, :T] == 0
    batch["tokens"][:, :T][padding] = word
    is_word = batch["tokens"][:, :T] == word
    assert (is_word & ~padding).sum() > 5

    def run(params, batch):
        full = train_step.targets(cfg, batch, jnp.int32(0))
        result = train_step.loss_and_grads(cfg, params, full)
        return full, result, train_step.eval_step(cfg, params, batch, jnp.asarray(BYTES), jnp.int32(0), jnp.int32(0))

    full, ((loss, _), grads), evaluation = jax.device_get(jax.jit(run)(host_state("mdm").params, batch))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, grads, evaluation)))
    assert not full.counted_BxT[is_word].any() and full.counted_BxT[~is_word].any()
    np.testing.assert_array_equal(full.inputs_BxT[is_word], word)
    assert evaluation["tokens"] == (~is_word & ~padding)[:, 1:].sum()
    # The weights are 1/t over the number of tokens that count.
    weight = full.weight_BxT * (~is_word & ~padding).sum()
    pairs = weight.max(1).reshape(-1, 2)
    pairs = pairs[(pairs > 0).all(1)]
    np.testing.assert_allclose((1 / pairs).sum(1), 1.0, rtol=1e-5)


# --- evaluation


BYTES = np.random.default_rng(3).integers(1, 9, 128).astype(np.int32)


@functools.cache
def evaluator(objective: str, packing: str = "chunk", microbatches: int = 1):
    cfg = CONFIGS[objective]
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, packing=packing),
        run=dataclasses.replace(cfg.run, microbatches=microbatches),
    )
    step = programs.make_eval_step(cfg)

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
    scored = batch["segment_ids"][:, 1:T] != 0
    if packing == "segments":  # the first token of a later document is context as well
        scored &= batch["segment_ids"][:, 1:T] == batch["segment_ids"][:, : T - 1]
    assert mdm["tokens"] == scored.sum()
    assert mdm["bytes"] == BYTES[batch["tokens"][:, 1:T]][scored].sum()


def test_the_arm_evaluation_is_its_definition():
    batch = random_batch()
    segments = (batch["segment_ids"][:, : T - 1] != 0).astype(np.int32)
    nll = nll_of("arm", host_state("arm").params, batch["tokens"][:, : T - 1], segments, batch["tokens"][:, 1:T])
    assert evaluator("arm")(batch)["nats"] == pytest.approx(nll[batch["segment_ids"][:, 1:T] != 0].sum(), rel=1e-5)


@pytest.mark.parametrize("objective", CONFIGS)
def test_evaluation_sees_as_many_positions_as_training(objective, monkeypatch):
    """So that what the kernel of attention takes in one, it takes in the other."""
    cfg, seen = CONFIGS[objective], []
    monkeypatch.setattr(Transformer, "__call__", lambda self, tokens, *_, **__: seen.append(tokens.shape[1]) or 1 / 0)
    for run in (
        lambda: train_step.train_step(cfg, host_state(objective), random_batch(), jnp.int32(0)),
        lambda: train_step.eval_step(cfg, host_state(objective).params, random_batch(), BYTES, jnp.int32(0), 0),
    ):
        with pytest.raises(ZeroDivisionError):
            jax.eval_shape(run)
    assert set(seen) == {T}


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


@pytest.mark.parametrize("objective", CONFIGS)
def test_the_batch_size_does_not_change_the_evaluation(objective):
    batch, run = random_batch(), evaluator(objective)
    halves = [run({name: x[i * B // 2 : (i + 1) * B // 2] for name, x in batch.items()}, i, 1) for i in (0, 1)]
    whole = run(batch, 0, 1)
    for name in ("nats", "tokens", "bytes"):
        assert halves[0][name] + halves[1][name] == pytest.approx(whole[name], rel=1e-5), name


def test_evaluation_noise_is_that_of_records_and_draw():
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
        run=dataclasses.replace(MDM.run, seed=9),
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


@pytest.mark.parametrize("objective", CONFIGS)
def test_what_stands_in_the_padding_is_not_looked_at(objective):
    batch, other = random_batch(), random_batch()
    padding = batch["segment_ids"] == 0
    other["tokens"][padding] = (other["tokens"][padding] + 1) % V
    assert evaluator(objective)(batch, 4) == evaluator(objective)(other, 4)
    state, metrics = one_step(objective)
    other_state, other_metrics = run_step(objective, host_state(objective), other, 0)
    assert metrics == other_metrics
    chex.assert_trees_all_equal(state, other_state)


def test_mesh_and_micro_batches_do_not_change_the_evaluation():
    mesh = mesh_of((2, 2, 2))
    batch = jax.device_put(random_batch(), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(MDM, mesh)).params
    params = jax.device_put(host_state("mdm").params, shardings)
    alone = evaluator("mdm")(random_batch(), 3, 1)
    assert evaluator("mdm", microbatches=4)(batch, 3, 1, params, mesh) == pytest.approx(alone, rel=1e-5)


def test_an_empty_batch_scores_nothing():
    empty = {"tokens": np.zeros((B, T + 1), np.int32), "segment_ids": np.zeros((B, T + 1), np.int32)}
    for objective in CONFIGS:
        assert evaluator(objective)(empty) == {"nats": 0.0, "tokens": 0.0, "bytes": 0.0}
