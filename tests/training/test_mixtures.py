"""Runs on mixtures: what they report of each source, how they resume, and what is refused before they begin."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from support import tiny_run
from support.run_files import assert_bit_equal, saved_state, timeless, truncated_copy
from support.tiny_run import BATCH, record, refusal, tiny

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.cli import train as cli_train
from diffusionlm.compile_check.workloads import training_step
from diffusionlm.data.mixtures import Mixture
from diffusionlm.data.pipeline import Dataset
from diffusionlm.fingerprint import fingerprint
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.presets import arm_twin
from diffusionlm.training import metrics
from diffusionlm.training.batches import Batches
from diffusionlm.training.dataset import open_or_prepare
from diffusionlm.training.evaluate import BY_SOURCE, Evaluator
from diffusionlm.training.programs import structure

STEPS, CHANGE = 12, 7
MIXTURE = f"web=0.75,code=0.25;{CHANGE}:web=0.25,code=0.75"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("web", "code", "maths")):
        shutil.move(tiny_run.make_dataset(folder / f"of_{name}", seed), folder / name)
    return folder


def mixed(folder, mixture=MIXTURE, **changes):
    changes["data"] = {"mixture": mixture, **changes.get("data", {})}
    changes["run"] = {"steps": STEPS, "eval_every": 6, "checkpoint_every": 3, **changes.get("run", {})}
    return tiny(folder, diffusion={"random_length": 0.0}, **changes).validate()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Return a run on two sources, from start to end, and what its steps were given."""
    return record(mixed(folder), tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_each_line_has_the_loss_of_each_source(whole):
    """All rows have equally many tokens here, so the loss is the mean over the rows."""
    run, recorder = whole
    lines = [line for line in metrics.read(run.workdir) if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    for k, line in enumerate(lines):
        rows = np.bincount(recorder.inputs[k]["[0]['source']"], minlength=2)
        assert rows.tolist() == ([12, 4] if k < CHANGE else [4, 12])
        assert line["loss"] == pytest.approx((rows * [line["loss/web"], line["loss/code"]]).sum() / BATCH, rel=1e-5)


def test_the_end_says_what_was_seen_of_each_source(whole, folder):
    run, _ = whole
    sources = run.result["sources"]
    assert {name: source["rows"] for name, source in sources.items()} == {
        "web": 12 * CHANGE + 4 * (STEPS - CHANGE),
        "code": 4 * CHANGE + 12 * (STEPS - CHANGE),
    }
    assert sum(source["share"] for source in sources.values()) == pytest.approx(1)
    assert json.loads((run.workdir / "DONE.json").read_text())["sources"] == sources
    text = cli_train._result_text(run.result, False, run.workdir, run.config)
    assert f"trained on web {104 / 192:.1%} of the rows, " in text and "; code 45.8% of the rows, " in text


def evaluated_alone(run, folder, name):
    cfg = dataclasses.replace(
        run.config, data=dataclasses.replace(run.config.data, mixture="", path=f"{folder}/{name}")
    )
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        dataset = open_or_prepare(cfg, run.workdir)
        params = checkpoint.load_params(run.workdir)
        return Evaluator(cfg, dataset, Batches(cfg, dataset, mesh))(params, STEPS)


def assert_evaluated(run, folder):
    """The numbers of each source are those that it has alone, and the mixture's those of a text with its shares."""
    found, weights = run.result["eval"], (0.25, 0.75)  # of the last phase
    alone = [evaluated_alone(run, folder, name) for name in ("web", "code")]
    for name, values in zip(("web", "code"), alone, strict=True):
        assert {key: found[f"{key}/{name}"] for key in BY_SOURCE} == {key: values[key] for key in BY_SOURCE}

    def mean(values):
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    nats = mean(values["nelbo_nats_per_token"] for values in alone)
    assert found["nelbo_nats_per_token"] == pytest.approx(nats, rel=1e-12)
    bytes_a_token = mean(values["bytes"] / values["tokens"] for values in alone)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_a_token, rel=1e-4)
    assert found["tokens"] == sum(values["tokens"] for values in alone)
    draws = [mean(values) for values in zip(*(values["nelbo_per_draw"] for values in alone), strict=True)]
    assert found["nelbo_per_draw"] == pytest.approx(draws, rel=1e-12)
    return found, draws


def test_each_source_is_evaluated_as_it_would_be_alone(whole, folder):
    run, _ = whole
    found, draws = assert_evaluated(run, folder)
    assert found["nelbo_stderr"] == pytest.approx(np.std(draws, ddof=1) / math.sqrt(len(draws)), rel=1e-9)
    lines = [line for line in metrics.read(run.workdir) if "eval_tokens" in line]
    assert [line["step"] for line in lines] == [6, STEPS]
    # Before the change the shares were the other way round.
    of = [lines[0][f"eval_nelbo_nats_per_token/{name}"] for name in ("web", "code")]
    assert lines[0]["eval_nelbo_nats_per_token"] == pytest.approx(0.75 * of[0] + 0.25 * of[1], rel=1e-9)


@pytest.mark.slow
def test_an_autoregressive_run_is_evaluated_by_source_too(folder, tmp_path):
    cfg = mixed(folder)
    cfg = dataclasses.replace(cfg, objective="arm", model=arm_twin(cfg.model)).validate()
    run, _ = record(cfg, tmp_path)
    found, _ = assert_evaluated(run, folder)
    assert found["nelbo_stderr"] == 0
    line = next(line for line in metrics.read(run.workdir) if line["step"] == 3)
    assert line["loss"] == pytest.approx(0.75 * line["loss/web"] + 0.25 * line["loss/code"], rel=1e-5)


def test_it_resumes_across_a_change_of_shares_to_the_bit(whole, folder, tmp_path):
    run, steps = whole
    workdir = truncated_copy(whole, tmp_path / "run", 6)
    moved = shutil.copytree(folder, tmp_path / "moved")
    cfg = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, path=str(moved)))
    again, resumed = record(cfg, workdir)
    assert list(resumed.states) == list(range(6, STEPS))
    for k in resumed.states:
        assert_bit_equal(resumed.states[k], steps.states[k])
        assert_bit_equal(resumed.inputs[k], steps.inputs[k])
    assert_bit_equal(saved_state(cfg, workdir), saved_state(cfg, run.workdir))
    assert timeless(workdir) == timeless(run.workdir) and again.result["sources"] == run.result["sources"]


def test_a_checkpoint_says_what_was_mixed(whole, folder):
    run, _ = whole
    source, mixture = checkpoint.load_sidecar(run.workdir).source, open_or_prepare(run.config, run.workdir)
    assert source["mixture"] == MIXTURE and source["dataset"] == mixture.sha256
    for label, dataset in zip(mixture.labels, mixture.datasets, strict=True):
        assert source[f"dataset/{label}"] == dataset.sha256


def test_other_contents_under_the_same_names_are_refused(whole, folder, tmp_path):
    workdir = truncated_copy(whole, tmp_path / "run", 6)
    shutil.copytree(folder / "web", tmp_path / "other" / "web")
    shutil.copytree(folder / "maths", tmp_path / "other" / "code")
    assert "was trained on another dataset" in refusal(mixed(tmp_path / "other"), workdir)
    message = refusal(mixed(folder, "web=0.5,code=0.5"), whole[0].workdir)
    assert f"data.mixture ({MIXTURE} there, web=0.5,code=0.5 here)" in message


def test_a_mixture_of_one_dataset_is_a_run_on_it(folder, tmp_path):
    alone = mixed(folder, "web=1")
    plain = mixed(folder, "", data={"path": str(folder / "web")})
    assert isinstance(open_or_prepare(alone, tmp_path), Dataset)
    assert isinstance(open_or_prepare(mixed(folder), tmp_path), Mixture)
    assert fingerprint(alone) == fingerprint(plain) and structure(alone) == structure(plain)
    mesh = make_mesh(alone.mesh, jax.devices()[:1])
    for cfg in (alone, plain):
        assert set(next(Batches(cfg, open_or_prepare(cfg, tmp_path), mesh).train(0))) == {"tokens", "segment_ids"}


def test_programs_know_the_number_of_sources_alone(folder):
    assert structure(mixed(folder)) == structure(mixed(folder, "x/maths=0.5,web=0.5", data={"max_epochs": 9.0}))
    assert structure(mixed(folder)) != structure(mixed(folder, "web=0.5,code=0.3,maths=0.2"))


def test_the_step_that_is_compiled_ahead_is_that_of_the_run(folder):
    cfg = mixed(folder)
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        lowered = training_step(cfg, mesh).lower()
        run = Batches(cfg, open_or_prepare(cfg, folder), mesh)
        batch = next(run.train(0))
    there = lowered.args_info[0][2]
    assert {name: (info.shape, info.dtype) for name, info in there.items()} == {
        name: (value.shape, value.dtype) for name, value in batch.items()
    }


def test_a_run_that_repeats_a_source_too_often_is_refused_before_it_begins(folder, tmp_path):
    size = open_or_prepare(mixed(folder), tmp_path).datasets[1].size("train")
    cfg = mixed(folder, "web=0.75,code=0.25", data={"max_epochs": 1.5}, run={"steps": 10_000})
    message = refusal(cfg, tmp_path / "run")
    assert f"would go through {folder}/web " in message and "data.max_epochs=1.5" in message
    steps = int(message.split("--run.steps ")[1].split()[0])
    rows = int(1.5 * open_or_prepare(mixed(folder), tmp_path).datasets[0].size("train"))
    assert abs(steps * BATCH * 0.75 - rows) <= BATCH and "a weight" not in message  # none would fit
    assert not (tmp_path / "run" / "config.json").exists()
    most = int(1.5 * size) + rows  # of all sources together
    changes = {"data": {"max_epochs": 1.5}, "run": {"steps": most // BATCH - 2}}
    message = refusal(mixed(folder, "web=0.75,code=0.25", **changes), tmp_path / "run")
    weight = float(message.split("a weight of at most ")[1].split()[0])
    assert weight * changes["run"]["steps"] * BATCH == pytest.approx(rows, abs=1)
    proposed = mixed(folder, f"web={weight:.6f},code={1 - weight:.6f}", **changes)
    assert isinstance(open_or_prepare(proposed, tmp_path), Mixture)
    fits = mixed(folder, "web=0.75,code=0.25", data={"max_epochs": 1.5}, run={"steps": steps})
    assert isinstance(open_or_prepare(fits, tmp_path), Mixture)
    plain = mixed(folder, "", data={"path": str(folder / "code"), "max_epochs": 2.0}, run={"steps": size})
    assert f"would go through {folder}/code 16.00 times" in refusal(plain, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"source": "x.txt"}}, ["data.mixture=", "data.source=x.txt"]),
        ({"run": {"showcase": True}}, ["run.showcase=True", "data.mixture="]),
    ],
)
def test_what_contradicts_a_mixture_is_refused(folder, tmp_path, changes, said):
    message = refusal(tiny_run.with_changes(mixed(folder), changes), tmp_path / "run")
    assert all(words in message for words in said)


def test_sources_that_do_not_fit_the_model_are_refused(folder, tmp_path):
    message = refusal(mixed(folder, data={"sequence_length": 12}), tmp_path / "run")
    assert f"dataset {folder}/web was prepared for data.sequence_length 16 (the experiment: 12)" in message
