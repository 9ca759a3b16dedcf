"""Bad batches: what is left out, what a run returns to, and that neither a resume nor the host's delay changes it."""

import functools
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_run
from support.tiny_run import BATCH, Recorder, spoiling, tiny

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import SafetyConfig
from diffusionlm.data.pipeline import open_dataset, train_batches
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import bad_batches as safety
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics, programs, timeline
from diffusionlm.training.state import abstract_state, create_state

STEPS = 14
NAN, SPIKE = math.nan, 1e4  # what the weights of a batch are multiplied by


def config(dataset, **policy):
    run = {"steps": STEPS, "eval_every": 0, "eval_records": BATCH, "checkpoint_every": 5}
    return tiny(dataset, run=run, safety=policy)


def mesh_of(cfg):
    return make_mesh(cfg, jax.devices()[:1])


def play(cfg, workdir, spoilt, before_step=lambda index: None):
    """Trains with some batches spoilt, on one device; returns the run, and what its steps were given."""
    recorder = Recorder(before_step)
    with pytest.MonkeyPatch.context() as patch, spoiling(spoilt):
        patch.setattr(trainer, "make_mesh", mesh_of)
        patch.setattr(trainer, "make_train_step", recorder)
        patch.setattr(safety, "HISTORY", 5)
        return trainer.train(cfg, workdir), recorder


def stop_at(index):
    def before_step(at):
        if at == index:
            os.kill(os.getpid(), signal.SIGTERM)

    return before_step


@functools.cache
def plain(dataset):
    """The mesh, the initial state, and the step without a policy."""
    cfg = config(dataset)
    mesh = mesh_of(cfg.mesh)
    return mesh, jax.device_get(create_state(cfg, mesh)), programs.make_train_step(cfg, mesh)


def by_hand(dataset, indices, factors):
    """The state after steps on these batches, with these factors on the learning rate."""
    mesh, state, step = plain(dataset)
    there = train_batches(open_dataset(dataset), batch_size=BATCH, seed=config(dataset).run.seed)
    batches = dict(zip(range(max(indices) + 1), there, strict=False))  # they have no end
    with jax.set_mesh(mesh):
        for index, factor in zip(indices, factors, strict=True):
            guard = state.guard.replace(lr_factor=np.float32(factor))
            state, found = step(state.replace(next_index=np.int32(index), guard=guard), batches[index], index)
            assert found["applied"] == 1
    return tiny_run.leaves(jax.device_get(state))


def saved(cfg, workdir, step=None):
    with checkpoint.CheckpointManager(workdir, keep=100) as manager:
        return tiny_run.leaves(manager.restore(abstract_state(cfg, mesh_of(cfg.mesh)), step))


def assert_bit_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes(), name


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if not name.startswith(".guard"):
            np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-5, err_msg=name)


def events(workdir):
    return [line for line in timeline.read(workdir) if line["event"] not in ("spent", "start", "stop", "done")]


# The rule


def test_a_jump_is_measured_by_the_decaying_mean_of_the_steps_taken():
    cfg, rng = SafetyConfig(spike_factor=4.0), np.random.default_rng(0)
    is_bad = jax.jit(lambda guard, step, norm: safety.is_bad(cfg, guard, step, jnp.float32(1), norm))
    after_step = jax.jit(safety.after_step)
    guard, taken, judged = safety.new_guard(), [], []
    for _ in range(300):
        norm = float(rng.lognormal(0, 1))
        bad = bool(is_bad(guard, jnp.int32(len(taken)), jnp.float32(norm)))
        weights = 0.99 ** np.arange(len(taken))[::-1]
        expected = len(taken) >= 100 and norm > 4 * np.average(taken, weights=weights)
        assert bad == expected
        judged.append(bad)
        if not bad:
            taken.append(norm)
            guard = after_step(guard, jnp.float32(norm))
    assert 3 < sum(judged) < 50


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("factor", [0.0, 4.0])
def test_what_is_not_finite_is_bad_from_the_first_step_on(loss, norm, factor):
    cfg = SafetyConfig(spike_factor=factor)
    assert safety.is_bad(cfg, safety.new_guard(), jnp.int32(0), jnp.float32(loss), jnp.float32(norm))
    assert not safety.is_bad(cfg, safety.new_guard(), jnp.int32(0), jnp.float32(1), jnp.float32(1e30))


# Left out

SKIP = {"max_skips": 2, "spike_factor": 20.0}
SPOILT = {4: NAN, 7: NAN, 8: NAN, 11: SPIKE, 17: NAN}  # 4 would be saved, and 17 would be the last
GOOD = [k for k in range(19) if k not in SPOILT]


@pytest.fixture(scope="module")
def skipped(dataset, tmp_path_factory):
    return play(config(dataset, **SKIP), tmp_path_factory.mktemp("skipped"), SPOILT)


@pytest.mark.slow
def test_bad_batches_are_left_out_and_nothing_else_changes(skipped, dataset):
    run, recorder = skipped
    assert len(GOOD) == STEPS and list(recorder.states) == list(range(19))  # each batch once
    final = saved(run.config, run.workdir)
    assert (final[".step"], final[".next_index"], final[".guard.skips"]) == (STEPS, 19, 0)
    assert_close(final, by_hand(dataset, GOOD, [1.0] * STEPS))
    assert sorted(path.name for path in (run.workdir / "checkpoints").iterdir()) == ["10", "14", "5"]
    assert saved(run.config, run.workdir, 5)[".next_index"] == 6  # four good ones, a bad one, and the fifth
    lines = [line for line in metrics.read(run.workdir) if "loss" in line]
    assert [(line["step"], line["skipped"]) for line in lines] == [(n + 1, k - n) for n, k in enumerate(GOOD)]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert [(line["event"], line["batch"]) for line in events(run.workdir)] == [("skip", k) for k in SPOILT]
    assert run.result["skipped"] == len(SPOILT) and run.result["rollbacks"] == 0
    json.loads((run.workdir / "timeline.jsonl").read_text().split("\n")[3], parse_constant=pytest.fail)


@pytest.mark.slow
def test_a_resume_across_a_batch_that_was_left_out_is_bit_equal(skipped, tmp_path):
    run, recorder = skipped
    stopped, _ = play(run.config, tmp_path, SPOILT, stop_at(8))  # when the first of two in a row was not yet known of
    assert not stopped.done
    again, resumed = play(run.config, tmp_path, SPOILT)
    assert_bit_equal(saved(again.config, again.workdir), saved(run.config, run.workdir))
    for k, state in resumed.states.items():
        if k in GOOD:  # before a bad one, how many were left out may be counted anew
            assert_bit_equal(state, recorder.states[k])
    assert again.result["eval"] == run.result["eval"] and again.result["skipped"] == len(SPOILT)


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_another_policy_goes_on(skipped, dataset, tmp_path):
    cfg = config(dataset, **SKIP | {"max_skips": 1})
    for _ in range(2):  # a second call fails at the same place
        with pytest.raises(
            trainer.DivergenceError, match="step 7 on batch 8 gave loss nan.* saved as step 6 .*max_skips"
        ):
            play(cfg, tmp_path, SPOILT)
        state = saved(cfg, tmp_path)
        assert (state[".step"], state[".next_index"], state[".guard.skips"]) == (6, 8, 1)
    run, resumed = play(skipped[0].config, tmp_path, SPOILT)
    assert min(resumed.states) == 8 and run.result["skipped"] == len(SPOILT)
    assert_close(saved(cfg, tmp_path), saved(cfg, skipped[0].workdir))


# Rolled back

BACK = {"max_rollbacks": 1, "rollback_lr": 0.5}


@pytest.fixture(scope="module")
def rolled_back(dataset, tmp_path_factory):
    return play(config(dataset, **BACK), tmp_path_factory.mktemp("rolled_back"), {8: NAN})


@pytest.mark.slow
def test_a_roll_back_returns_to_the_checkpoint_and_goes_on_behind_the_batch(rolled_back, dataset):
    run, _ = rolled_back
    final = saved(run.config, run.workdir)
    assert (final[".step"], final[".next_index"], final[".guard.rollbacks"]) == (STEPS, 18, 1)
    assert final[".guard.lr_factor"] == 0.5
    assert_close(final, by_hand(dataset, [*range(5), *range(9, 18)], [1.0] * 5 + [0.5] * 9))
    lines = [line for line in metrics.read(run.workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))  # each once, though some were taken twice
    rates = [1e-3 * k for k in range(5)] + [0.5e-3 * k for k in range(5, 10)]  # of the warm-up
    np.testing.assert_allclose([line["lr"] for line in lines[:10]], rates, rtol=1e-5)
    (event,) = events(run.workdir)
    assert math.isnan(event["loss"])
    assert {name: event[name] for name in ("event", "step", "from_step", "batch", "lr_factor")} == {
        "event": "rollback",
        "step": 5,
        "from_step": 8,
        "batch": 8,
        "lr_factor": 0.5,
    }
    assert (run.result["rollbacks"], run.result["skipped"]) == (1, 4)
    assert run.result["seconds_by_kind"]["lost"] > 0


@pytest.mark.slow
def test_a_resume_after_a_roll_back_is_bit_equal(rolled_back, tmp_path):
    run, recorder = rolled_back
    stopped, _ = play(run.config, tmp_path, {8: NAN}, stop_at(11))
    assert not stopped.done
    again, resumed = play(run.config, tmp_path, {8: NAN})
    assert min(resumed.states) > 11
    for k, state in resumed.states.items():
        assert_bit_equal(state, recorder.states[k])
    assert_bit_equal(saved(again.config, again.workdir), saved(run.config, run.workdir))


@pytest.mark.slow
def test_a_kill_after_a_roll_back_repeats_it(rolled_back, tmp_path):
    def killed(index):
        if index == 11:
            raise RuntimeError("killed")

    run, _ = rolled_back
    with pytest.raises(RuntimeError, match="killed"):
        play(run.config, tmp_path, {8: NAN}, killed)
    again, resumed = play(run.config, tmp_path, {8: NAN})
    assert min(resumed.states) == 5
    assert_bit_equal(saved(again.config, again.workdir), saved(run.config, run.workdir))
    assert again.result["rollbacks"] == 1


@pytest.mark.slow
def test_without_a_checkpoint_it_begins_anew_and_then_it_stops(dataset, tmp_path):
    cfg = config(dataset, **BACK)
    with pytest.raises(trainer.DivergenceError, match="step 4 on batch 6 gave loss nan.* saved as step 3 "):
        play(cfg, tmp_path, {2: NAN, 6: NAN})
    assert_close(saved(cfg, tmp_path), by_hand(dataset, [3, 4, 5], [0.5] * 3))
