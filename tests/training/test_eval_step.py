"""The evaluation step: fair to both objectives, and independent of batches, meshes and micro-batches."""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special
from support.slow_cases import slow_but
from support.tiny_step import (
    ALONE,
    BYTES,
    CONFIGS,
    MDM,
    B,
    T,
    V,
    four_rows,
    host_state,
    mesh_of,
    nll_of,
    one_step,
    random_batch,
    run_step,
)

from diffusionlm.config import DiffusionConfig
from diffusionlm.model.transformer import Transformer
from diffusionlm.training import programs
from diffusionlm.training import step as train_step
from diffusionlm.training.state import abstract_state

# --- evaluation


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
        return {name: float(x) for name, x in out.items() if x.ndim == 0}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("packing", [pytest.param("chunk", marks=pytest.mark.slow), "segments"])
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
    cfg, state, seen = CONFIGS[objective], host_state(objective), []
    monkeypatch.setattr(Transformer, "__call__", lambda self, tokens, *_, **__: seen.append(tokens.shape[1]) or 1 / 0)
    for run in (
        lambda: train_step.train_step(cfg, state, random_batch(), jnp.int32(0)),
        lambda: train_step.eval_step(cfg, state.params, random_batch(), BYTES, jnp.int32(0), 0),
    ):
        with pytest.raises(ZeroDivisionError):
            jax.eval_shape(run)
    assert set(seen) == {T}


@pytest.mark.slow
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


@pytest.mark.parametrize("objective", slow_but(CONFIGS, ("mdm",)))
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


@pytest.mark.slow
@pytest.mark.parametrize("objective", CONFIGS)
def test_what_stands_in_the_padding_is_not_looked_at(objective):
    batch, other = random_batch(), random_batch()
    padding = batch["segment_ids"] == 0
    other["tokens"][padding] = (other["tokens"][padding] + 1) % V
    assert evaluator(objective)(batch, 4) == evaluator(objective)(other, 4)
    state, metrics = one_step(objective)
    other_state, other_metrics = run_step(objective, host_state(objective), other, 0)
    chex.assert_trees_all_equal(metrics, other_metrics)
    chex.assert_trees_all_equal(state, other_state)


@pytest.mark.slow
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
