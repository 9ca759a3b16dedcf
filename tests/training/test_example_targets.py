"""Examples of fine-tuning: several in a row, prompts that are masked too, and prompts that are left out."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special
from support.random_params import make_params
from support.tiny_step import ALONE, ARM, CONFIGS, MDM, B, T, V, host_state, mesh_of, nll_of

from diffusionlm.config_data import ANSWER, PADDING, PARTS, PROMPT
from diffusionlm.diffusion.corruption import dropped_prompts
from diffusionlm.diffusion.noise import prompts_key
from diffusionlm.model.transformer import Transformer
from diffusionlm.training import step as train_step

EOS, LENGTH = 3, 28


def config(objective="mdm", packing="packed_examples", *, model=None, diffusion=None, data=None):
    cfg = CONFIGS[objective]
    length = LENGTH if packing == "packed_examples" else T
    changes = {
        "model": dataclasses.replace(cfg.model, max_length=length, **(model or {})),
        "diffusion": dataclasses.replace(
            cfg.diffusion, **{"random_length": 0.0, "normalization": "examples"} | (diffusion or {})
        ),
        "data": dataclasses.replace(cfg.data, packing=packing, sequence_length=length, **(data or {})),
    }
    return dataclasses.replace(cfg, **changes).validate()


@functools.cache
def packed_batch():
    """Return rows of two or three examples: prompts of 1 to 3 tokens, answers of 1 to 3, up to 2 of padding."""
    rng = np.random.default_rng(7)
    tokens, ids = np.full((B, LENGTH + 1), EOS, np.int32), np.zeros((B, LENGTH + 1), np.int32)
    for row in range(B):
        at = 0
        for number in range(rng.integers(2, 4)):
            sizes = rng.integers(1, 4), rng.integers(1, 4), rng.integers(0, 3)
            tokens[row, at : at + sizes[0] + sizes[1] - 1] = rng.integers(4, V, sizes[0] + sizes[1] - 1)
            for part, size in zip((PROMPT, ANSWER, PADDING), sizes, strict=True):
                ids[row, at : at + size] = PARTS * number + part
                at += size
            at += rng.integers(0, 2)  # a dialogue that was cut leaves a gap, which nothing sees
    return {"tokens": tokens, "segment_ids": ids}


def single_batch():
    """Return rows of one example of up to 7 of the 8 tokens."""
    rng = np.random.default_rng(8)
    tokens, parts = np.full((B, T + 1), EOS, np.int32), np.zeros((B, T + 1), np.int32)
    for row in range(B):
        prompt, answer = rng.integers(1, 5), rng.integers(1, 4)
        tokens[row, : prompt + answer - 1] = rng.integers(4, V, prompt + answer - 1)
        parts[row, :prompt], parts[row, prompt : prompt + answer] = PROMPT, ANSWER
    return {"tokens": tokens, "segment_ids": parts}


def targets_of(cfg, batch, index=0, sizes=ALONE):
    mesh = mesh_of(sizes)
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        return jax.device_get(compiled_targets(cfg)(batch, jnp.int32(index)))


@functools.cache
def compiled_targets(cfg):
    return jax.jit(lambda batch, index: train_step.targets(cfg, batch, index))


def examples(batch):
    """Yield row, number and places of every example of a packed batch, as the model sees it."""
    ids = batch["segment_ids"][:, :LENGTH]
    for row in range(B):
        for number in range(ids[row].max() // PARTS + 1):
            yield row, number, np.flatnonzero((ids[row] // PARTS == number) & (ids[row] != 0))


# --- several examples in a row


@pytest.mark.slow
def test_in_packed_rows_answers_and_their_padding_are_masked():
    cfg, parts = config(), packed_batch()["segment_ids"][:, :LENGTH] % PARTS
    ever = np.zeros(parts.shape, bool)
    for index in range(12):
        full = targets_of(cfg, packed_batch(), index)
        masked = full.inputs_BxT == V  # no clean token is V
        np.testing.assert_array_equal(masked, full.counted_BxT)
        assert not masked[(parts == PROMPT) | (parts == 0)].any()
        ever |= masked
    assert ever[(parts == ANSWER) | (parts == PADDING)].mean() > 0.99


def test_each_example_of_a_row_weighs_as_one_of_its_own_would():
    """LLaDA, Algorithm 2: 1 / (t L') on the masked tokens of each, with L' its answer and padding, and their mean."""
    full, parts = targets_of(config(), packed_batch()), packed_batch()["segment_ids"][:, :LENGTH] % PARTS
    total = sum(1 for _ in examples(packed_batch()))
    times = [set() for _ in range(B)]
    for row, _, places in examples(packed_batch()):
        learned = places[parts[row, places] != PROMPT]
        weights = full.weight_BxT[row, learned]
        times[row] |= {round(1 / (w * len(learned) * total), 5) for w in weights[weights > 0]}
    assert all(len(found) <= 1 for found in times)  # one time a row
    pairs = [first | second for first, second in zip(times[::2], times[1::2], strict=True) if first and second]
    assert len(pairs) > 3
    assert [sum(pair) for pair in pairs if len(pair) == 2] == pytest.approx([1.0] * len(pairs), abs=1e-4)


@pytest.mark.parametrize("positions", ["learned", pytest.param("rope", marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", ["mdm", pytest.param("arm", marks=pytest.mark.slow)])
def test_an_example_costs_in_a_packed_row_what_it_costs_alone(objective, positions):
    """The others of its row are not seen, and its positions count from 0."""
    cfg, batch = config(objective, model={"positions": positions}), packed_batch()
    full = targets_of(cfg, batch)
    params = make_params(cfg.model, sharpness=1)
    params = jax.tree.map(lambda x: 3 * x, params)  # so that attention and positions matter
    (loss, _), _ = jax.jit(lambda p, t: train_step.loss_and_grads(cfg, p, t))(params, full)
    alone = {"inputs": [], "labels": [], "weight": [], "segments": []}
    for row, number, _ in examples(batch):
        places = np.flatnonzero(full.segment_ids_BxT[row] == number + 1)
        fields = (full.inputs_BxT, full.labels_BxT, full.weight_BxT, np.ones((B, LENGTH), np.int32))
        for name, values in zip(alone, fields, strict=True):
            alone[name].append(np.pad(values[row, places], (0, LENGTH - len(places))))
    inputs, labels, weight, segments = (np.stack(rows) for rows in alone.values())
    assert weight.sum() == pytest.approx(full.weight_BxT.sum())

    @jax.jit
    def logits_of(params, inputs, segments):
        model = Transformer(cfg.model)
        hidden = model.apply({"params": params}, inputs, segments)
        return model.apply({"params": params}, hidden, method=Transformer.head)[..., :V]

    logits = np.asarray(logits_of(params, inputs, segments), np.float64)
    nll = special.logsumexp(logits, axis=-1) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    assert float(loss) == pytest.approx((weight * nll).sum(), rel=1e-4)


def test_an_autoregressive_model_learns_each_answer_with_one_eos():
    full, batch = targets_of(config("arm"), packed_batch()), packed_batch()
    labels = batch["segment_ids"][:, 1:] % PARTS
    np.testing.assert_array_equal(full.counted_BxT > 0, labels == ANSWER)
    total = sum(1 for _ in examples(batch))
    for row, number, _ in examples(batch):
        answer = batch["segment_ids"][row, 1:] == PARTS * number + ANSWER
        np.testing.assert_allclose(full.weight_BxT[row, answer], 1 / (answer.sum() * total), rtol=1e-6)


# --- all of a text is learned


def test_all_of_a_text_can_be_masked_and_learned():
    """SMDM's reversal fine-tuning: BOS, prompt, completion, EOS and padding; the loss is over all of b * max_len."""
    cfg = config(packing="examples", data={"learn": "all", "pad_group": 4}, diffusion={"normalization": "tokens"})
    batch = single_batch()
    longest = np.repeat((batch["segment_ids"][:, :T] != 0).sum(1).reshape(-1, 4).max(1), 4)
    seen = np.arange(T)[None] < longest[:, None]
    ever = np.zeros((B, T), bool)
    for index in range(16):
        full = targets_of(cfg, batch, index)
        masked = full.inputs_BxT == V
        np.testing.assert_array_equal(full.segment_ids_BxT, seen)
        np.testing.assert_array_equal(masked, full.counted_BxT)
        ever |= masked
        times = 1 / (full.weight_BxT * seen.sum()).max(1, where=masked, initial=1.0)
        pairs = times.reshape(-1, 2)[masked.any(1).reshape(-1, 2).all(1)]
        np.testing.assert_allclose(pairs.sum(1), 1.0, rtol=1e-4)
    assert not ever[~seen].any() and ever[seen].mean() > 0.99 and ever[:, 0].all()


@pytest.mark.slow
@pytest.mark.parametrize("objective", CONFIGS)
def test_whole_texts_are_scored_given_their_first_token(objective):
    """The twins score the same tokens; padding and EOS beyond the first are none of them."""
    cfg, batch = config(objective, packing="examples", data={"learn": "all"}), single_batch()
    run = jax.jit(lambda b: train_step.eval_step(cfg, host_state(objective).params, b, jnp.ones(128, jnp.int32), 0, 0))
    found = run(batch)
    parts = batch["segment_ids"][:, :T]
    assert float(found["tokens"]) == (parts != 0).sum() - B
    if objective == "arm":
        nll = nll_of(
            "arm", host_state("arm").params, batch["tokens"][:, :-1], np.ones((B, T), np.int32), batch["tokens"][:, 1:]
        )
        assert float(found["nats"]) == pytest.approx(nll[batch["segment_ids"][:, 1:] != 0].sum(), rel=1e-5)


@pytest.mark.parametrize("group, longest", [(-1, T), (1, None)])
def test_rows_can_be_padded_to_the_end_or_not_at_all(group, longest):
    batch = single_batch()
    full = targets_of(config(packing="examples", data={"pad_group": group}), batch)
    lengths = (batch["segment_ids"][:, :T] != 0).sum(1)
    np.testing.assert_array_equal((full.segment_ids_BxT != 0).sum(1), longest or lengths)


# --- prompts are left out


def test_prompts_are_masked_whole_and_nothing_else_changes():
    """SMDM's released code: the prompt is overwritten once it is decided which tokens of the answer are masked."""
    batch, share, drops, rows = packed_batch(), 0.3, 0, 0
    ids = batch["segment_ids"][:, :LENGTH]
    split, patterns = 0, set()
    for index in range(30):
        plain = targets_of(config(), batch, index)
        full = targets_of(config(diffusion={"prompt_dropout": share}), batch, index)
        for name in ("labels_BxT", "weight_BxT", "counted_BxT", "segment_ids_BxT", "level_B"):
            np.testing.assert_array_equal(getattr(full, name), getattr(plain, name))
        changed = full.inputs_BxT != plain.inputs_BxT
        assert (full.inputs_BxT[changed] == V).all() and (ids[changed] % PARTS == PROMPT).all()
        dropped = []
        for row, number, _ in examples(batch):
            here = changed[row, ids[row] == PARTS * number + PROMPT]
            assert here.all() or not here.any()
            dropped.append((row, here.all()))
        patterns.add(tuple(dropped))
        drops, rows = drops + sum(d for _, d in dropped), rows + len(dropped)
        split += sum(len({d for r, d in dropped if r == row}) == 2 for row in range(B))
    assert abs(drops / rows - share) < 4 * (share * (1 - share) / rows) ** 0.5
    assert split > 50  # examples of one row are decided apart
    assert len(patterns) == 30  # and anew in each batch


@pytest.mark.slow
def test_which_prompts_are_left_out_depends_on_seed_batch_and_example_alone():
    cfg, batch = config(packing="examples", diffusion={"prompt_dropout": 0.5}), single_batch()
    alone, split = (targets_of(cfg, batch, 3, sizes) for sizes in (ALONE, (2, 2, 2)))
    np.testing.assert_array_equal(alone.inputs_BxT, split.inputs_BxT)
    segments, prompt = np.ones((B, T), np.int32), np.ones((B, T), bool)
    draws = {
        (seed, index): np.asarray(dropped_prompts(0.5, segments, prompt, prompts_key(seed, index)))[:, 0]
        for seed in (0, 1)
        for index in (0, 1)
    }
    assert len({draw.tobytes() for draw in draws.values()}) == 4
    half = dropped_prompts(0.5, segments[:8], prompt[:8], prompts_key(0, 0))
    np.testing.assert_array_equal(draws[0, 0][:8], np.asarray(half)[:, 0])  # whatever the size of the batch


def test_held_out_prompts_are_never_left_out():
    batch = single_batch()

    def program(cfg):
        arguments = (host_state("mdm").params, batch, np.ones(128, np.int32), np.int32(0), np.int32(0))
        return str(jax.make_jaxpr(lambda *x: train_step.eval_step(cfg, *x))(*arguments))

    plain = config(packing="examples")
    assert program(plain) == program(config(packing="examples", diffusion={"prompt_dropout": 0.5}))


# --- evaluation by level of noise


@pytest.mark.slow
def test_evaluation_reports_the_plain_cross_entropy_by_the_share_of_masked_tokens():
    cfg, params = config(packing="examples"), host_state("mdm").params
    batch = single_batch()

    def run(b):
        full = train_step.held_out_targets(cfg, b, jnp.int32(2), jnp.int32(1))
        return full.targets, train_step.eval_step(cfg, params, b, jnp.ones(128, jnp.int32), jnp.int32(2), jnp.int32(1))

    full, found = jax.device_get(jax.jit(run)(batch))
    nll = nll_of("mdm", params, full.inputs_BxT, full.segment_ids_BxT, full.labels_BxT)
    masked, by_hand = full.inputs_BxT == V, np.zeros((2, 10))
    for row in range(B):
        share = masked[row].sum() / (batch["segment_ids"][row, :T] == ANSWER).sum()
        level = next(i for i in range(10) if share < (i + 1) / 10 - 1e-9 or i == 9)
        by_hand[0, level] += nll[row][masked[row]].sum()
        by_hand[1, level] += masked[row].sum()
    np.testing.assert_allclose(found["levels"], by_hand, rtol=1e-5)


@pytest.mark.slow
def test_packed_rows_on_a_mesh_in_micro_batches():
    cfg = config(diffusion={"prompt_dropout": 0.5})
    alone, split = targets_of(cfg, packed_batch()), targets_of(cfg, packed_batch(), sizes=(2, 2, 2))
    chex.assert_trees_all_close(alone, split, rtol=1e-6)
    assert MDM.mask_id == V and ARM.mask_id is None
