"""Runs that grow are those that had the steps from the start; where they would not be, they are refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_run
from support.run_files import assert_bit_equal, content, saved_state, timeless, truncated_copy
from support.tiny_run import record, refusal, tiny

from diffusionlm.config import Config, DiffusionConfig, OptimConfig, RunConfig
from diffusionlm.training import growth, optimizer

SHORT, LONG = 6, 12


def steady(dataset, steps, *, run=None, **optim):
    optim = {"schedule": "constant", "warmup_steps": 2, **optim}
    settings = {"steps": steps, "eval_every": 4, "checkpoint_every": 3, **(run or {})}
    return tiny(dataset, optim=optim, run=settings).validate()


@pytest.fixture(scope="module")
def long(dataset, tmp_path_factory):
    return record(steady(dataset, LONG), tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def short(dataset, tmp_path_factory):
    return record(steady(dataset, SHORT), tmp_path_factory.mktemp("short"))


def assert_grown(found, workdir, long):
    """The grown run is the long one, but for the evaluation where it ended first."""
    run, recorder = long
    for k in found.states:
        assert_bit_equal(found.states[k], recorder.states[k])
        assert_bit_equal(found.inputs[k], recorder.inputs[k])
    assert_bit_equal(saved_state(run.config, workdir), saved_state(run.config, run.workdir))
    lines = [line for line in timeless(workdir) if (line["step"], "eval_tokens" in line) != (SHORT, True)]
    assert lines == timeless(run.workdir)
    assert json.loads((workdir / "config.json").read_text())["run"]["steps"] == LONG


@pytest.mark.slow
def test_a_finished_run_grows_to_the_bit(short, long, dataset, tmp_path, capsys):
    workdir = tmp_path / "run"
    truncated_copy(short, workdir, SHORT)
    (workdir / "DONE.json").write_bytes((short[0].workdir / "DONE.json").read_bytes())
    run, recorder = record(steady(dataset, LONG), workdir)
    assert list(recorder.states) == list(range(SHORT, LONG)) and run.step == LONG and not run.done_before
    assert_grown(recorder, workdir, long)
    assert run.result["eval"] == long[0].result["eval"] and run.result["step"] == LONG
    assert f"it grows from {SHORT} to {LONG} steps" in " ".join(capsys.readouterr().err.split())
    again, recorder = record(steady(dataset, LONG), workdir)
    assert again.done_before and not recorder.states
    assert f"run.steps ({LONG} there, {SHORT} here)" in refusal(steady(dataset, SHORT), workdir)


@pytest.mark.slow
def test_a_stopped_run_grows_to_the_bit(short, long, dataset, tmp_path):
    workdir = truncated_copy(short, tmp_path / "run", 3)
    _, recorder = record(steady(dataset, LONG), workdir)
    assert list(recorder.states) == list(range(3, LONG))
    assert_grown(recorder, workdir, long)


@pytest.mark.slow
def test_a_held_rate_grows_and_then_decays(dataset, tmp_path):
    """WSD: up to the decay the run is the long one."""
    decaying = {"schedule": "wsd", "decay_steps": 3}
    long = record(steady(dataset, LONG, **decaying), tmp_path / "long")
    short = record(steady(dataset, SHORT, **decaying), tmp_path / "short")
    assert "cannot grow" in refusal(steady(dataset, LONG, **decaying), short[0].workdir)
    workdir = truncated_copy(short, tmp_path / "run", 3)
    _, recorder = record(steady(dataset, LONG, **decaying), workdir)
    assert list(recorder.states) == list(range(3, LONG))
    assert_grown(recorder, workdir, long)


@pytest.mark.slow
def test_a_run_grows_after_its_autoregressive_part(dataset, tmp_path):
    """The part has a schedule by itself, which ends with it; here the run ended there too."""
    first = {"alignment": "shifted", "random_length": 0.0, "arm_steps": SHORT}
    settings = {"schedule": "cosine", "warmup_steps": 2}
    short = record(tiny_run.with_changes(steady(dataset, SHORT, **settings), {"diffusion": first}), tmp_path / "short")
    long_cfg = tiny_run.with_changes(steady(dataset, LONG, **settings), {"diffusion": first})
    long, recorder = record(long_cfg, tmp_path / "long")
    run, grown = record(long_cfg, short[0].workdir)
    assert list(grown.states) == list(range(SHORT, LONG))
    for k in grown.states:
        assert_bit_equal(grown.states[k], recorder.states[k])
    assert_bit_equal(saved_state(long_cfg, run.workdir), saved_state(long_cfg, long.workdir))


def test_a_run_whose_rates_lead_to_its_end_is_refused_and_told_the_way(short, dataset, tmp_path):
    cosine = steady(dataset, SHORT, schedule="cosine")
    workdir = truncated_copy(short, tmp_path / "run", SHORT)
    values = json.loads((workdir / "config.json").read_text())
    values["optim"]["schedule"] = "cosine"
    (workdir / "config.json").write_text(json.dumps(values))
    before = content(workdir)
    message = refusal(dataclasses.replace(cosine, run=dataclasses.replace(cosine.run, steps=LONG)), workdir)
    assert f"run.steps={SHORT}" in message and "optim.schedule=cosine" in message and f"to {LONG}" in message
    assert f"--run.continue_from {workdir}" in message and "--workdir" in message
    assert content(workdir) == before


def test_growth_comes_alone(short, dataset):
    message = refusal(tiny_run.with_changes(steady(dataset, LONG), {"run": {"seed": 8}}), short[0].workdir)
    assert "run.seed (7 there, 8 here)" in message and f"run.steps ({SHORT} there, {LONG} here)" in message


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(0, 8),
    st.integers(0, 8),
    st.sampled_from([0, 0, 5]),
    st.sampled_from([0, 9]),
    st.integers(1, 40),
)
def test_learning_rates_stay_up_to_there_and_no_further(schedule, warmup, decay, arm_steps, drop, more):
    """Every new length keeps the rate of each step that may be kept; some new length changes that of the next one."""
    steps = 24
    optim = OptimConfig(
        schedule=schedule,
        warmup_steps=warmup,
        decay_steps=decay if schedule == "wsd" else 0,
        drop_step=drop,
        drop_lr=1e-4 if drop else 0.0,
    )
    old = Config(
        optim=optim,
        run=RunConfig(steps=steps),
        diffusion=DiffusionConfig(alignment="shifted" if arm_steps else "same", arm_steps=arm_steps),
    )
    fixed = growth.fixed_steps(old)

    def rates(total):
        """Return the rates of all steps after the first part, as `train_step` has them."""
        clock = jnp.arange(steps - arm_steps)
        return np.asarray(optimizer.learning_rate(optim, total - arm_steps)(clock))

    kept = int(min(fixed, steps)) - arm_steps
    assert np.array_equal(rates(steps)[:kept], rates(steps + more)[:kept])
    if kept + 2 <= steps - arm_steps:  # the rate of the border itself is still the same
        assert not np.array_equal(rates(steps)[: kept + 2], rates(steps + 40)[: kept + 2])
