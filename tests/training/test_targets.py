"""The targets of a batch: prompts and answers, padding, and mask ids that are ordinary words."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.slow_cases import slow_but
from support.tiny_step import (
    ALONE,
    BYTES,
    CONFIGS,
    MDM,
    B,
    T,
    V,
    host_state,
    mesh_of,
    nll_of,
    random_batch,
)

from diffusionlm.config import Config, DiffusionConfig
from diffusionlm.training import step as train_step
from diffusionlm.training.state import abstract_state

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
def targets_of(objective: str, pad_group: int = 0):
    cfg = examples_of(objective, pad_group)
    return jax.jit(lambda batch, index: train_step.targets(cfg, batch, index))


@functools.cache
def loss_and_grads_of(objective: str, pad_group: int = 0, microbatches: int = 1):
    cfg = examples_of(objective, pad_group, microbatches=microbatches)
    return jax.jit(lambda params, full: train_step.loss_and_grads(cfg, params, full))


@functools.cache
def example_targets(objective: str, sizes: tuple[int, int, int] = ALONE, index: int = 0, pad_group: int = 0):
    mesh = mesh_of(sizes)
    batch = jax.device_put(example_batch(), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        return jax.device_get(targets_of(objective, pad_group)(batch, jnp.int32(index)))


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
    (loss, _), _ = loss_and_grads_of("mdm")(params, jax.tree.map(jnp.asarray, full))
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


@pytest.mark.slow
def test_the_fine_tuning_loss_of_an_arm_is_its_definition():
    batch = example_batch()
    inputs, labels, parts = batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["segment_ids"][:, 1:]
    params = host_state("arm").params
    full = example_targets("arm")
    (loss, _), _ = loss_and_grads_of("arm")(params, jax.tree.map(jnp.asarray, full))
    nll = nll_of("arm", params, inputs, np.ones((B, T), np.int32), labels)
    expected = np.mean([nll[row][parts[row] == 2].mean() for row in range(B)])
    assert loss == pytest.approx(expected, rel=1e-5)
    ends = (labels == EOS) & (full.counted_BxT > 0)
    np.testing.assert_array_equal(ends.sum(1), 1)  # one EOS each


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective, sizes, microbatches, pad_group",
    [("mdm", (2, 2, 2), 4, 2)]
    + [
        pytest.param(*setting, marks=pytest.mark.slow)
        for setting in (
            ("arm", (2, 2, 2), 4, 2),
            ("mdm", (1, 8, 1), 1, 0),
            ("arm", (1, 8, 1), 1, 0),
            ("mdm", (2, 2, 2), 4, 0),
            ("arm", (2, 2, 2), 4, 0),
        )
    ],
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
            found[where] = jax.device_get(loss_and_grads_of(objective, pad_group, parts)(params, full))
    chex.assert_trees_all_close(found[sizes][0], found[ALONE][0], rtol=1e-5)
    # In float64 the two agree within 5e-15. In float32 each is off by up to 6e-6 of a leaf's largest gradient, because
    # a device with one row multiplies matrices of another shape: see experiments/LOG.md.
    for split_gradient, gradient in zip(*map(jax.tree.leaves, (found[sizes][1], found[ALONE][1])), strict=True):
        np.testing.assert_allclose(split_gradient, gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mdm", "arm"])
def test_what_lies_behind_the_longest_example_changes_nothing(objective):
    """Neither its tokens nor its length: the rows at the end of longer records cost what they cost without it."""
    params = host_state(objective).params

    def loss(full):
        return float(loss_and_grads_of(objective)(params, full)[0][0])

    def targets(batch):
        return targets_of(objective)(batch, jnp.int32(0))

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


@pytest.mark.parametrize("objective", slow_but(CONFIGS, ("mdm",)))
def test_held_out_answers_are_scored_without_padding_on_canvases_of_their_own(objective):
    """So the number does not depend on batch mates, and twins score the same tokens."""
    cfg, params = examples_of(objective), host_state(objective).params
    compiled = jax.jit(lambda b: train_step.eval_step(cfg, params, b, jnp.ones(128, jnp.int32), 0, 0))

    def evaluate(batch):
        return {name: float(value) for name, value in compiled(batch).items() if value.ndim == 0}

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


@pytest.mark.slow
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
