"""Runs that go on from the whole state of another."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from support import tiny_run
from support.run_files import assert_bit_equal, checkpoint_steps, content, saved_state, timeless, truncated_copy
from support.tiny_run import record, refusal, tiny

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.errors import UserError
from diffusionlm.fingerprint import fingerprint
from diffusionlm.sharing.card import model_card
from diffusionlm.training import continuation, metrics, optimizer

FIRST, ALL = 6, 11


pytestmark = pytest.mark.slow  # each needs a run that another one goes on from, which takes ten seconds


def run_of(dataset, steps, continue_from="", *, data=None, optim=None, **run):
    settings = {"steps": steps, "eval_every": 0, "checkpoint_every": 2, "continue_from": str(continue_from), **run}
    return tiny(dataset, optim={"warmup_steps": 2, **(optim or {})}, run=settings, data=data or {}).validate()


@pytest.fixture(scope="module")
def first(dataset, tmp_path_factory):
    """A run to the end of its cosine."""
    return record(run_of(dataset, FIRST), tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def second(first, dataset, tmp_path_factory):
    return record(run_of(dataset, ALL, first[0].workdir), tmp_path_factory.mktemp("second"))


@pytest.fixture(scope="module")
def through(dataset, tmp_path_factory):
    """A run with all steps from the start."""
    return record(run_of(dataset, ALL), tmp_path_factory.mktemp("through"))


def test_it_begins_with_the_whole_state_and_the_next_batch(first, second, through):
    _, recorder = second
    assert list(recorder.states) == list(range(FIRST, ALL))
    assert_bit_equal(recorder.states[FIRST], saved_state(first[0].config, first[0].workdir))
    for k in recorder.inputs:  # neither rows nor noise are repeated
        assert_bit_equal(recorder.inputs[k], through[1].inputs[k])


def test_its_schedule_covers_its_own_steps(second):
    run, recorder = second
    rate = optimizer.learning_rate(run.config.optim, ALL - FIRST)
    found = [float(recorder.metrics[k]["lr"]) for k in recorder.metrics]
    assert found == pytest.approx([float(rate(k)) for k in range(ALL - FIRST)], rel=1e-6)
    assert found[0] == 0  # it warms up again
    lines = [line for line in metrics.read(run.workdir) if "loss" in line]
    assert [line["step"] for line in lines] == [*range(FIRST + 1, ALL + 1)]
    assert run.result["step"] == ALL and run.result["tokens"] == ALL * tiny_run.BATCH * tiny_run.LENGTH


def test_it_says_where_it_comes_from(first, second, dataset):
    run, _ = second
    recorded = json.loads((run.workdir / "config.json").read_text())["run"]
    assert recorded["continue_id"].startswith(f"tiny@{FIRST}-") and recorded["continued_steps"] == FIRST
    assert recorded["continue_from"] == str(first[0].workdir / "checkpoints" / str(FIRST))
    assert checkpoint.load_sidecar(run.workdir).source["continue_id"] == recorded["continue_id"]
    assert fingerprint(run.config) != fingerprint(run_of(dataset, ALL))


def test_what_the_first_run_began_with_is_known_to_the_last(first, dataset, tmp_path):
    begun = run_of(dataset, 2, init_from=str(first[0].workdir), optim={"warmup_steps": 1})
    run, _ = record(begun, tmp_path / "begun")
    last, _ = record(run_of(dataset, 4, run.workdir, optim={"warmup_steps": 1}), tmp_path / "last")
    source = checkpoint.load_sidecar(last.workdir).source
    assert source["init_id"] == run.config.run.init_id and source["init_id"].startswith(f"tiny@{FIRST}-")
    assert source["continue_id"].startswith("tiny@2-")
    assert f"| Began with | {source['init_id']} |" in model_card(last.workdir)
    again, _ = record(run_of(dataset, 4, run.workdir, optim={"warmup_steps": 1}), last.workdir)
    assert again.done_before


def test_it_resumes_to_the_bit_without_the_other_run(first, second, dataset, tmp_path):
    """Its own checkpoints are enough then, and the same command resumes it."""
    run, recorder = second
    workdir = truncated_copy(second, tmp_path / "run", 8)
    named = first[0].workdir.rename(first[0].workdir.parent / "hidden")
    try:
        again, resumed = record(run_of(dataset, ALL, first[0].workdir), workdir)
    finally:
        named.rename(first[0].workdir)
    assert list(resumed.states) == list(range(8, ALL))
    for k in resumed.states:
        assert_bit_equal(resumed.states[k], recorder.states[k])
    assert timeless(workdir) == timeless(run.workdir) and again.result["eval"] == run.result["eval"]


def test_a_constant_rate_without_warm_up_goes_on_as_if_nothing_had_happened(dataset, tmp_path):
    steady = {"schedule": "constant", "warmup_steps": 0}
    whole, recorder = record(run_of(dataset, ALL, optim=steady), tmp_path / "whole")
    before = content(whole.workdir)
    part = whole.workdir / "checkpoints" / "4"
    run, found = record(run_of(dataset, ALL, part, optim=steady, keep=9), tmp_path / "run")
    assert list(found.states) == list(range(4, ALL))
    assert_bit_equal(found.states[4], recorder.states[4])
    for k in found.states:  # by another program, in which the steps taken before are a number
        assert_bit_equal(found.inputs[k], recorder.inputs[k])
        for name, value in recorder.states[k].items():
            np.testing.assert_allclose(found.states[k][name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert content(whole.workdir) == before  # the other run is left alone
    grown, found = record(run_of(dataset, ALL + 2, part, optim=steady, keep=9), run.workdir)
    assert list(found.states) == [ALL, ALL + 1] and grown.config.run.continued_steps == 4


def test_a_run_on_one_dataset_goes_on_with_a_mixture(first, dataset, tmp_path):
    """As in a last phase on better text: the rows of the first source go on where they were."""
    shutil.copytree(dataset, tmp_path / "web")
    shutil.move(tiny_run.make_dataset(tmp_path / "of_code", seed=1), tmp_path / "code")
    data = {"path": str(tmp_path), "mixture": f"web=1;{FIRST}:web=0.25,code=0.75"}
    run, recorder = record(run_of(dataset, ALL, first[0].workdir, data=data), tmp_path / "run")
    assert run.result["sources"]["code"]["rows"] == 12 * (ALL - FIRST)
    plain = record(run_of(dataset, ALL), tmp_path / "plain")[1]
    rows = [recorder.inputs[k]["[0]['tokens']"][recorder.inputs[k]["[0]['source']"] == 0] for k in recorder.inputs]
    wanted = np.concatenate([plain.inputs[k]["[0]['tokens']"] for k in plain.inputs if k >= FIRST])
    np.testing.assert_array_equal(np.concatenate(rows), wanted[: sum(map(len, rows))])
    early = {**data, "mixture": f"web=1;{FIRST - 1}:web=0.25,code=0.75"}
    message = refusal(run_of(dataset, ALL, first[0].workdir, data=early), tmp_path / "early")
    assert f"other shares of its sources (data.mixture='') than data.mixture={early['mixture']!r}" in message
    swapped = {**data, "mixture": f"code=1;{FIRST}:web=0.25,code=0.75"}
    message = refusal(run_of(dataset, ALL, first[0].workdir, data=swapped), tmp_path / "swapped")
    assert "was trained on other data" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"seed": 8}}, ["run.seed (7 there, 8 here)", "--run.init_from"]),
        ({"data": {"batch_size": 8}}, ["data.batch_size (16 there, 8 here)"]),
        ({"optim": {"name": "muon"}}, ["optim.name (adamw there, muon here)"]),
        ({"model": {"d_ff": 64}}, ["model.d_ff (32 there, 64 here)"]),
        ({"run": {"steps": FIRST}}, [f"run.steps={FIRST} counts the {FIRST} steps", "--run.steps"]),
        ({"optim": {"warmup_steps": 9}}, ["optim.warmup_steps=9", f"run.steps - {FIRST} steps of run.continue_from=5"]),
        ({"run": {"init_from": "x"}}, ["run.init_from=x", "run.continue_from=", "give one of them"]),
        ({"run": {"continue_id": "other@3-000000000000"}}, ["not run.continue_id=other@3-000000000000"]),
        ({"run": {"continue_from": ""}}, None),
        ({"run": {"continue_from": "", "continue_id": "x"}}, ["run.continue_id=x needs run.continue_from"]),
    ],
    ids=str,
)
def test_wrong_combinations_are_one_line(first, dataset, tmp_path, changes, said):
    cfg = tiny_run.with_changes(run_of(dataset, ALL, first[0].workdir), changes)
    if said is None:
        assert cfg.validate() == run_of(dataset, ALL)
        return
    message = refusal(cfg, tmp_path / "run")
    assert all(words in message for words in said), message
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_is_no_whole_state_is_refused(first, dataset, tmp_path):
    run, _ = first
    missing = run_of(dataset, ALL, tmp_path / "none")
    assert refusal(missing, tmp_path / "run").startswith("run.continue_from: no checkpoint at")
    assert "is in " in refusal(run_of(dataset, ALL, run.workdir), run.workdir)
    shutil.copytree(run.workdir / "checkpoints" / str(FIRST), tmp_path / "parameters" / "checkpoints" / str(FIRST))
    shutil.rmtree(tmp_path / "parameters" / "checkpoints" / str(FIRST) / "train")
    message = refusal(run_of(dataset, ALL, tmp_path / "parameters"), tmp_path / "run")
    assert "holds parameters without the state" in message and "--run.init_from" in message
    (tmp_path / "nothing" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="^run.continue_from: "):
        continuation._start(epath.Path(tmp_path / "nothing" / "checkpoints" / "3")).current_identity()
    shutil.copytree(run.workdir / "checkpoints", tmp_path / "nameless" / "checkpoints")
    message = refusal(run_of(dataset, ALL, tmp_path / "nameless"), tmp_path / "run")
    assert "needs" in message and "config.json" in message
    other = tiny_run.make_dataset(tmp_path / "other", seed=1)
    message = refusal(run_of(other, ALL, run.workdir), tmp_path / "run")
    assert "was trained on other data" in message and str(other) in message
    assert checkpoint_steps(run.workdir)[-1] == FIRST


def test_another_start_is_another_run(first, second, dataset, tmp_path):
    run, _ = second
    assert f"with --run.continue_from {first[0].workdir}" in refusal(run_of(dataset, ALL), run.workdir)
    elsewhere = run_of(dataset, ALL, first[0].workdir / "checkpoints" / "4")
    message = refusal(elsewhere, run.workdir)
    assert "run.continue_id (tiny@6-" in message and "run.continued_steps (6 there, 4 here)" in message
    shutil.copytree(first[0].workdir, tmp_path / "moved")  # a copy is the same state
    moved = run_of(dataset, ALL, tmp_path / "moved")
    again, _ = record(moved, run.workdir)
    assert again.done_before


def test_a_state_within_the_autoregressive_part_is_refused(dataset, tmp_path, first):
    workdir = shutil.copytree(first[0].workdir, tmp_path / "old")
    values = json.loads((workdir / "config.json").read_text())
    values["diffusion"] |= {"alignment": "shifted", "arm_steps": 8}
    (workdir / "config.json").write_text(json.dumps(values | {"run": values["run"] | {"steps": 20}}))
    cfg = tiny_run.with_changes(run_of(dataset, 30, workdir), {"diffusion": {"alignment": "shifted", "arm_steps": 8}})
    assert "is within the 8 steps of diffusion.arm_steps" in refusal(dataclasses.replace(cfg), tmp_path / "run")
