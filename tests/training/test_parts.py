"""Runs that begin as an autoregressive model and go on as a diffusion model: their parts, borders and records."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from support import tiny_run
from support.run_files import assert_bit_equal, saved_state, timeless, truncated_copy
from support.tiny_run import STEPS, record, with_changes

from diffusionlm.checkpoint import store
from diffusionlm.config import Config, DiffusionConfig, RunConfig
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.fingerprint import fingerprint
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.presets import arm_twin
from diffusionlm.pretrained.loading import load
from diffusionlm.training import bad_batches, metrics, outcome, timeline
from diffusionlm.training import step as train_step
from diffusionlm.training.batches import Batches
from diffusionlm.training.evaluate import Evaluator
from diffusionlm.training.parts import config_of, opens_at, part_of, parts
from diffusionlm.training.state import abstract_state

ARM_STEPS, ANNEAL_STEPS = 12, 6


def road(dataset, **changes):
    """A run of `STEPS` steps with all three parts."""
    changes.setdefault("diffusion", {})
    changes["diffusion"] = {
        "alignment": "shifted",
        "random_length": 0.0,
        "arm_steps": ARM_STEPS,
        "anneal_steps": ANNEAL_STEPS,
        **changes["diffusion"],
    }
    optim = {"peak_lr": 1e-2, "arm_peak_lr": 3e-2, "final_lr": 1e-3, "warmup_steps": 4}
    changes["optim"] = {**optim, **changes.get("optim", {})}
    return tiny_run.tiny(dataset, **changes).validate()


def arm_run(dataset, steps, **run):
    """An autoregressive run that says nothing of parts."""
    cfg = tiny_run.tiny(
        dataset,
        diffusion={"random_length": 0.0},
        optim={"peak_lr": 3e-2, "final_lr": 1e-3, "warmup_steps": 4},
        run={"steps": steps, **run},
    )
    return dataclasses.replace(cfg, objective="arm", model=arm_twin(cfg.model)).validate()


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Return the run of `road` from start to end, and what its steps were given."""
    return record(road(dataset), tmp_path_factory.mktemp("road"))


@pytest.fixture(scope="module")
def wide(dataset, tmp_path_factory):
    """Return the same run on eight devices."""
    return record(road(dataset), tmp_path_factory.mktemp("wide"), mesh_devices=8)


# --- the parts by themselves


def test_a_batch_belongs_to_one_part_and_parts_follow_each_other():
    """Batch n of the part that opens has a share (n + 1) / N of its edges; the one with all of them is full."""
    cfg = Config(diffusion=DiffusionConfig(alignment="shifted", arm_steps=5, anneal_steps=3), run=RunConfig(steps=9))
    expected = ["autoregressive"] * 5 + ["opening"] * 2 + ["full"] * 2
    assert [part_of(cfg, n) for n in range(9)] == expected
    assert list(parts(cfg)) == ["autoregressive", "opening", "full"]
    assert [n for n in range(10) if opens_at(cfg, n)] == [5]


@pytest.mark.parametrize(
    ("diffusion", "expected"),
    [
        ({}, ["full"]),
        ({"anneal_steps": 1}, ["full"]),
        ({"anneal_steps": 4}, ["opening", "full"]),
        ({"arm_steps": 4}, ["autoregressive", "full"]),
        ({"arm_steps": 9}, ["autoregressive"]),
    ],
)
def test_the_parts_of_a_run_are_those_that_have_batches(diffusion, expected):
    cfg = Config(diffusion=DiffusionConfig(alignment="shifted", **diffusion), run=RunConfig(steps=9))
    assert list(parts(cfg)) == expected == list(dict.fromkeys(part_of(cfg, n) for n in range(9)))


def test_the_part_of_an_autoregressive_run_is_that_run(dataset):
    cfg = arm_run(dataset, 9)
    assert list(parts(cfg)) == ["autoregressive"] and config_of(cfg, "autoregressive") is cfg


# --- the first part is an autoregressive run


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_the_first_part_ends_with_the_parameters_of_the_autoregressive_run_of_its_length(devices, dataset, tmp_path):
    """Bit for bit, although the diffusion model has one more row in its embedding, which nothing predicts."""
    cfg = road(dataset, run={"steps": ARM_STEPS + 8, "checkpoint_every": ARM_STEPS})
    arm = arm_run(dataset, ARM_STEPS)
    record(cfg, tmp_path / "road", mesh_devices=devices)
    record(arm, tmp_path / "arm", mesh_devices=devices)
    with jax.default_device(jax.devices()[0]):
        params = [
            tiny_run.leaves(store.load_params(store.find(tmp_path / name / "checkpoints" / str(ARM_STEPS)), None))
            for name in ("road", "arm")
        ]
    assert_bit_equal(*params)
    lines = [timeless(tmp_path / name) for name in ("road", "arm")]
    for there, here in zip(*(part[:ARM_STEPS] for part in lines), strict=True):
        assert there == here
    borders = [next(line for line in part if line["step"] == ARM_STEPS and "eval_bytes" in line) for part in lines]
    assert borders[0]["eval_nelbo_nats_per_token"] == borders[1]["eval_nelbo_nats_per_token"]


@pytest.mark.slow
def test_a_run_of_that_part_alone_is_an_autoregressive_run_and_says_so(dataset, tmp_path, caplog):
    there, _ = record(arm_run(dataset, ARM_STEPS), tmp_path / "arm")
    assert "none trains diffusion" not in caplog.text
    cfg = road(dataset, run={"steps": ARM_STEPS}, diffusion={"anneal_steps": 0})
    here, _ = record(cfg, tmp_path / "road")
    line = f"all {ARM_STEPS} steps are autoregressive, as diffusion.arm_steps={ARM_STEPS}, and none trains diffusion: "
    assert caplog.text.count(line) == 1
    figures = ("nelbo_nats_per_token", "bits_per_byte", "nelbo_stderr", "nelbo_per_draw")
    assert {name: here.result["eval"][name] for name in figures} == {
        name: there.result["eval"][name] for name in figures
    }
    assert here.result["eval"]["autoregressive_nats_per_token"] == here.result["eval"]["nelbo_nats_per_token"]
    assert here.result["flops"] == there.result["flops"]
    assert load(here.workdir).config.autoregressive


# --- the later parts


@pytest.mark.slow
def test_each_part_warms_up_and_decays_by_itself(whole):
    """Linear over 4 steps to the peak of the part, and half a cosine to its final rate at the end of the part."""
    run, _ = whole

    def rates(peak, steps):
        warming = [peak * step / 4 for step in range(4)]
        return warming + [
            1e-3 + (peak - 1e-3) * (1 + math.cos(math.pi * (step - 4) / (steps - 4))) / 2 for step in range(4, steps)
        ]

    expected = rates(3e-2, ARM_STEPS) + rates(1e-2, STEPS - ARM_STEPS)
    lines = [line for line in metrics.read(run.workdir) if "lr" in line]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_the_figures_are_those_of_another_mesh(whole, wide):
    for name in ("nelbo_nats_per_token", "autoregressive_nats_per_token"):
        assert wide[0].result["eval"][name] == pytest.approx(whole[0].result["eval"][name], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(5, id="first", marks=pytest.mark.slow),
        pytest.param(10, id="before the border"),
        pytest.param(15, id="opening", marks=pytest.mark.slow),
        pytest.param(20, id="full", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_that_resumes_in_any_part_ends_bit_for_bit(step, devices, request, tmp_path):
    started = request.getfixturevalue({1: "whole", 8: "wide"}[devices])
    run, recorder = started
    workdir = truncated_copy(started, tmp_path, step)
    again, resumed = record(run.config, workdir, mesh_devices=devices)
    assert min(resumed.states) == step
    for index, state in resumed.states.items():
        assert_bit_equal(state, recorder.states[index])
    assert_bit_equal(saved_state(run.config, workdir), saved_state(run.config, run.workdir))
    assert again.result["eval"] == run.result["eval"] and timeless(workdir) == timeless(run.workdir)


@pytest.mark.slow
def test_a_run_that_was_saved_at_the_border_resumes_behind_it(dataset, tmp_path):
    cfg = road(dataset, run={"checkpoint_every": ARM_STEPS, "steps": ARM_STEPS + 8, "eval_every": 0})
    whole = record(cfg, tmp_path / "whole")
    workdir = truncated_copy(whole, tmp_path / "again", ARM_STEPS)
    again, resumed = record(cfg, workdir)
    assert min(resumed.states) == ARM_STEPS
    assert again.result["eval"] == whole[0].result["eval"] and timeless(workdir) == timeless(whole[0].workdir)


# --- its records


@pytest.mark.slow
def test_evaluations_have_the_exact_loss_and_after_the_border_the_bound(whole):
    """At the border, and at every 15th step; of an autoregressive model the bound is the exact loss."""
    run, _ = whole
    lines = {line["step"]: line for line in metrics.read(run.workdir) if "eval_bytes" in line}
    assert sorted(lines) == [ARM_STEPS, 15, STEPS]
    exact = {step: line["eval_autoregressive_nats_per_token"] for step, line in lines.items()}
    assert lines[ARM_STEPS]["eval_nelbo_nats_per_token"] == exact[ARM_STEPS]
    assert lines[ARM_STEPS]["eval_nelbo_stderr"] == 0
    for step in (15, STEPS):
        assert lines[step]["eval_nelbo_nats_per_token"] != exact[step] and lines[step]["eval_nelbo_stderr"] > 0


@pytest.mark.slow
def test_the_exact_loss_of_the_final_network_is_that_of_an_autoregressive_model_with_its_weights(whole, dataset):
    run, _ = whole
    cfg = arm_run(dataset, STEPS)
    mesh, data = make_mesh(cfg.mesh), open_dataset(dataset)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh).params)
    final = store.load_params(store.find(run.workdir), None, shardings)
    with jax.set_mesh(mesh):
        exact = Evaluator(cfg, data, Batches(cfg, data, mesh))(final, 1)
    assert run.result["eval"]["autoregressive_nats_per_token"] == pytest.approx(exact["nelbo_nats_per_token"], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_says_what_the_network_is_at_its_step(whole):
    """Up to the border it is an autoregressive model, which samples from left to right."""
    run, _ = whole
    for step, autoregressive in ((5, True), (10, True), (15, False), (STEPS, False)):
        path = run.workdir / "checkpoints" / str(step)
        sidecar = store.load_sidecar(path)
        assert (sidecar.objective == "arm") == autoregressive == sidecar.model["causal"]
        assert sidecar.alignment == "shifted"
        model = load(path)
        assert model.config.autoregressive == autoregressive
        if autoregressive:
            assert model.generate(length=4)[0].nfe >= 1


def spoilt_run(cfg, workdir, batches):
    with pytest.MonkeyPatch.context() as patch, tiny_run.own_programs():
        patch.setattr(train_step, "targets", tiny_run.spoil_batches(dict.fromkeys(batches, math.nan)))
        return record(cfg, workdir)[0]


def evaluations(run):
    return {line["step"]: line for line in metrics.read(run.workdir) if "eval_bytes" in line}


@pytest.mark.slow
def test_a_batch_that_is_left_out_does_not_move_the_border(dataset, tmp_path):
    """The border is a batch: one step fewer was taken there, and the figures of the first part are written anyway."""
    run = {"steps": ARM_STEPS + 8, "eval_every": 0}
    cfg = road(dataset, run=run, diffusion={"anneal_steps": 0}, safety={"max_skips": 1})
    run = spoilt_run(cfg, tmp_path, [ARM_STEPS - 1])
    lines = evaluations(run)
    assert sorted(lines) == [ARM_STEPS - 1, ARM_STEPS + 8]
    assert lines[ARM_STEPS - 1]["eval_nelbo_stderr"] == 0
    assert run.result["skipped"] == 1
    rates = [line["lr"] for line in metrics.read(run.workdir) if "lr" in line]
    assert rates[ARM_STEPS - 1] == 0, "the second part warms up from its first batch"
    assert rates[ARM_STEPS + 2] == pytest.approx(0.75e-2)


@pytest.mark.slow
def test_a_roll_back_in_a_later_part_returns_to_the_border_at_most(dataset, tmp_path):
    """The border is saved, so the steps after it are undone and the figures of the first part are kept."""
    policy = {"max_rollbacks": 1}
    cfg = road(dataset, run={"steps": ARM_STEPS + 8, "eval_every": 0, "checkpoint_every": 100}, safety=policy)
    run = spoilt_run(cfg, tmp_path, [ARM_STEPS + 2])
    lines = metrics.read(run.workdir)
    assert sorted(evaluations(run)) == [ARM_STEPS, ARM_STEPS + 8]
    (event,) = [line for line in timeline.read(run.workdir) if line["event"] == "rollback"]
    assert (event["from_step"], event["step"]) == (ARM_STEPS + 2, ARM_STEPS)
    part = outcome.autoregressive_part(lines)
    assert part and part["step"] == ARM_STEPS
    assert [line["lr"] for line in lines if line["step"] == ARM_STEPS + 1 and "lr" in line] == [pytest.approx(0.75e-2)]


@pytest.mark.slow
def test_an_autoregressive_run_stays_one_when_a_batch_is_left_out(dataset, tmp_path):
    """With `arm_steps` of all steps, the batch in place of the one that was left out is autoregressive too."""
    cfg = road(dataset, run={"steps": ARM_STEPS, "eval_every": 0}, diffusion={"anneal_steps": 0})
    run = spoilt_run(with_changes(cfg, {"safety": {"max_skips": 1}}), tmp_path, [3])
    assert run.result["skipped"] == 1 and run.result["eval"]["nelbo_stderr"] == 0
    assert load(run.workdir).config.autoregressive


def test_gradient_norms_of_one_part_say_nothing_about_another():
    """A part's first norm begins the history against which later ones are spikes."""
    guard = dataclasses.replace(bad_batches.new_guard(), norm_sum=jnp.float32(7.0))
    assert float(bad_batches.start_history(guard, jnp.int32(0)).norm_sum) == 0
    assert float(bad_batches.start_history(guard, jnp.int32(1)).norm_sum) == 7


def test_the_fingerprint_knows_the_parts(dataset):
    cfgs = [road(dataset, diffusion={"arm_steps": n}) for n in (4, 8, 12)]
    cfgs.append(road(dataset, optim={"arm_peak_lr": 0.5}))
    assert len({fingerprint(cfg) for cfg in cfgs}) == 4
