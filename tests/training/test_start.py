"""The weights that a run begins with: which checkpoint it is, and which runs may start from it."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import stub_hub, tiny_run
from support.fine_tuning import sidecar_of, tuned
from support.tiny_run import refusal

import diffusionlm as dlm
from diffusionlm import config, config_io, fingerprint
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.data import pipeline
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.presets import arm_twin
from diffusionlm.training import loop as trainer
from diffusionlm.training.start import Start, initial_state, resolve
from diffusionlm.training.state import abstract_state
from diffusionlm.training.stepper import Stepper


@pytest.fixture(scope="module")
def dataset(fine_tuned):
    return fine_tuned.dataset


@pytest.fixture(scope="module")
def start(fine_tuned):
    return fine_tuned.start


@pytest.fixture(scope="module")
def run(fine_tuned):
    return fine_tuned.run


def identity(path):
    return Start(checkpoint.find(path)).identity


@pytest.mark.slow
def test_a_run_starts_from_the_weights_in_float32(run, start):
    given = tiny_run.leaves({"params": start[1]})
    before = {name: value for name, value in run[1].states[0].items() if name.startswith(".params")}
    assert len(given) == len(before) > 5
    for (_, value), found in zip(sorted(given.items()), (before[name] for name in sorted(before)), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.asarray(value, np.float32))
    moments = [value for name, value in run[1].states[0].items() if ".opt_state" in name]
    assert not any(value.any() for value in moments)


@pytest.mark.slow
def test_parameters_lie_on_the_mesh_of_the_run(dataset, start):
    cfg = tuned(dataset, run={"init_from": str(start[0])})
    cfg, resolved = resolve(cfg, Path("nowhere"))
    mesh = make_mesh(config.MeshConfig(2, 2, 2))
    opened = pipeline.open_dataset(dataset)
    with jax.set_mesh(mesh):
        state = initial_state(cfg, resolved, opened, mesh)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract_state(cfg, mesh)), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_the_start_is_part_of_the_science_wherever_it_lies(run, dataset, start, tmp_path):
    found = run[0].config.run.init_id
    assert found.startswith("base@7-") and found == identity(start[0])
    assert fingerprint.fingerprint(run[0].config) != fingerprint.fingerprint(tuned(dataset))
    shutil.copytree(start[0], tmp_path / "moved")
    moved = tuned(dataset, run={"init_from": str(tmp_path / "moved")})
    moved, _ = resolve(moved, tmp_path)
    assert fingerprint.fingerprint(moved) == fingerprint.fingerprint(run[0].config)
    assert checkpoint.load_sidecar(run[0].workdir).source["init_id"] == found
    assert json.loads((run[0].workdir / "config.json").read_text())["run"]["init_id"] == found


@pytest.mark.slow
def test_another_start_is_another_run(run, dataset, tmp_path, start):
    other = tmp_path / "other"
    checkpoint.save_params(
        other, start[1], sidecar_of(tuned(dataset), dataset, source={"experiment": "base", "step": 8})
    )
    message = refusal(tuned(dataset, run={"init_from": str(other)}), run[0].workdir)
    assert "run.init_id (base@7-" in message and "base@8-" in message
    assert message.endswith(f"with --run.init_from {start[0]}")
    assert "run.init_id (base@7-" in refusal(tuned(dataset), run[0].workdir)
    plain = tuned(dataset, run={"steps": 1, "eval_every": 0}, optim={"warmup_steps": 0})
    trainer.train(plain, tmp_path / "plain")
    started = tiny_run.with_changes(plain, {"run": {"init_from": str(start[0])}})
    assert refusal(started, tmp_path / "plain").endswith("with no --run.init_from")
    named = tuned(dataset, run={"init_from": str(other), "init_id": run[0].config.run.init_id})
    assert "is base@8-" in refusal(named, tmp_path / "run") and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"d_ff": 64}}, "holds another model: model.d_ff (32 there, 64 here)"),
        ({"model": {"rope_theta": 5e5}}, "model.rope_theta (10000.0 there, 500000.0 here)"),
        ({"model": {"mask_row": False}, "diffusion": {"mask_id": 5}}, "model.mask_row (True there, False here)"),
    ],
)
def test_another_model_is_refused(changes, said, dataset, start, tmp_path):
    cfg = tuned(dataset, run={"init_from": str(start[0])}, **changes)
    assert said in refusal(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_another_mask_token_tokenizer_or_objective_is_refused(dataset, start, tmp_path):
    cfg = tuned(dataset)
    kept = {"mask_row": False}
    inside = tiny_run.with_changes(cfg, {"model": kept, "diffusion": {"mask_id": 5}})
    tokenizer = {"kind": "byte", "sha256": "f" * 64}
    twin = dataclasses.replace(cfg, objective="arm", model=arm_twin(cfg.model))
    other = tiny_run.with_changes(inside, {"diffusion": {"mask_id": 6}})
    shifted = tiny_run.with_changes(cfg, {"diffusion": {"alignment": "shifted"}})
    unsuppressed = tiny_run.with_changes(inside, {"diffusion": {"suppress_mask": False}})
    for name, ours, theirs, said in (
        ("mask", inside, sidecar_of(other, dataset, suppressed_ids=(6,)), "masks with id 6, this run with 5"),
        ("tokenizer", cfg, sidecar_of(cfg, dataset, tokenizer=tokenizer), "data prepare --tokenizer"),
        ("objective", twin, sidecar_of(cfg, dataset), "model.causal (False there, True here)"),
        ("shifted", cfg, sidecar_of(shifted, dataset, alignment="shifted"), "predicts with alignment 'shifted'"),
        (
            "suppressed",
            inside,
            sidecar_of(unsuppressed, dataset),
            "never predicts the ids [], this run [5]; set --diffusion.suppress_mask False",
        ),
        ("nameless", cfg, sidecar_of(cfg, dataset, source={}), "does not say what it is (its sidecar has an empty"),
    ):
        checkpoint.save_params(tmp_path / name, start[1], theirs)
        ours = tiny_run.with_changes(ours, {"run": {"init_from": str(tmp_path / name)}})
        assert said in refusal(ours, tmp_path / f"{name} run")
        assert not (tmp_path / f"{name} run").exists() or name == "tokenizer"


@pytest.mark.slow
def test_the_identity_tells_what_the_parameters_are(dataset, start, tmp_path):
    """Other numbers, another dtype or another alignment under the same names are another start; a copy is none."""
    cfg, found = tuned(dataset), {}
    for name, scale, dtype, alignment in (
        ("same", 1, jnp.bfloat16, "same"),
        ("other", 2, jnp.bfloat16, "same"),
        ("wide", 1, jnp.float32, "same"),
        ("shifted", 1, jnp.bfloat16, "shifted"),
    ):
        saved = tiny_run.with_changes(cfg, {"diffusion": {"alignment": alignment}})
        params = jax.tree.map(lambda x, scale=scale, dtype=dtype: (jnp.asarray(x) * scale).astype(dtype), start[1])
        checkpoint.save_params(tmp_path / name, params, sidecar_of(saved, dataset, alignment=alignment))
        found[name] = identity(tmp_path / name)
    assert len(set(found.values())) == len(found)
    shutil.copytree(tmp_path / "same", tmp_path / "copy")
    assert identity(tmp_path / "copy") == found["same"]


@pytest.mark.slow
def test_a_directory_s_newest_step_is_looked_up_once(dataset, start, tmp_path, monkeypatch):
    """It may be training still: the step that was found first is checked, loaded, and kept when the run goes on."""
    base, workdir = tmp_path / "base", tmp_path / "run"
    settings = {"init_from": str(base), "steps": 2, "eval_every": 0, "checkpoint_every": 1}
    cfg = tuned(dataset, run=settings, optim={"warmup_steps": 0})
    for step in (7, 8):
        source = {"experiment": "base", "step": step}
        checkpoint.save_params(tmp_path / str(step), start[1], sidecar_of(cfg, dataset, source=source))
    (base / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "7", base / "checkpoints" / "7")
    opened = trainer.open_or_prepare

    def grows(*args):
        shutil.copytree(tmp_path / "8", base / "checkpoints" / "8")
        return opened(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "open_or_prepare", grows)
        patch.setattr(trainer.Loop, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(cfg, workdir)
    assert json.loads((workdir / "config.json").read_text())["run"]["init_from"] == str(base / "checkpoints" / "7")
    assert trainer.train(cfg, workdir).config.run.init_id.startswith("base@7-")
    named = tiny_run.with_changes(cfg, {"run": {"init_from": str(base / "checkpoints" / "8")}})
    assert "base@8-" in refusal(named, workdir)


@pytest.fixture
def pushed(start, monkeypatch, tmp_path):
    """Push the start to a stand-in for the Hub, and return the stand-in and the address of the commit."""
    stub = stub_hub.install(monkeypatch, tmp_path / "hub")
    return stub, dlm.push_to_hub(start[0], "me/base")


@pytest.mark.slow
def test_a_run_from_the_hub_goes_on_with_the_same_command(pushed, dataset, start, tmp_path):
    """The commit is kept, and no path of this disk: later commits of the repository are other starts."""
    stub, address = pushed
    workdir, given = tmp_path / "run", tuned(dataset, run={"init_from": "hf://me/base"})
    cfg, resolved = resolve(given, workdir)
    assert cfg.run.init_from == address and cfg.run.init_id == identity(start[0])
    opened, mesh = pipeline.open_dataset(dataset), make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        initial_state(cfg, resolved, opened, mesh)
    workdir.mkdir()
    (workdir / "config.json").write_text(config_io.to_json(cfg))
    other = tmp_path / "other"
    checkpoint.save_params(other, start[1], sidecar_of(cfg, dataset, source={"experiment": "base", "step": 8}))
    newer = dlm.push_to_hub(other, "me/base")
    for name in ("hf://me/base", "hf://me/base@main", address):
        assert resolve(tiny_run.with_changes(given, {"run": {"init_from": name}}), workdir)[0] == cfg
    named = tiny_run.with_changes(given, {"run": {"init_from": newer}})
    assert resolve(named, workdir)[0].run.init_id.startswith("base@8-")
    moved = tiny_run.with_changes(given, {"run": {"init_from": str(start[0])}})
    assert resolve(moved, workdir)[0].run.init_id == cfg.run.init_id


@pytest.mark.slow
def test_every_process_fetches_a_start_from_the_hub(pushed, dataset, start, tmp_path, monkeypatch):
    """A host whose disk does not have it takes the commit that the first process says."""
    stub, address = pushed
    found = json.dumps([address, identity(start[0])])
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: 1)
        patch.setattr(processes, "gather", lambda text: [found])
        cfg, resolved = resolve(tuned(dataset, run={"init_from": "hf://me/base"}), tmp_path / "run")
    assert stub.downloads == 0 and cfg.run.init_from == address
    assert resolved.current_identity() == cfg.run.init_id and stub.downloads == 1


def test_there_must_be_a_checkpoint(dataset, tmp_path):
    for path in (tmp_path / "absent", dataset):
        assert "run.init_from: " in refusal(tuned(dataset, run={"init_from": str(path)}), tmp_path / "run")
    assert "needs run.init_from" in refusal(tuned(dataset, run={"init_id": "base@7-0"}), tmp_path / "run")


@pytest.mark.slow
def test_before_its_first_checkpoint_a_run_still_needs_its_start(dataset, start, tmp_path):
    workdir, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(start[0], gone)
    cfg = tuned(dataset, run={"init_from": str(gone)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "dispatch", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(cfg, workdir)
    shutil.rmtree(gone)
    assert "run.init_from: no checkpoint at" in refusal(cfg, workdir)
    checkpoint.save_params(gone, start[1], sidecar_of(cfg, dataset, source={"experiment": "another"}))
    assert "is now another@0-" in refusal(cfg, workdir)


@pytest.mark.slow
def test_a_start_that_is_replaced_while_data_are_prepared_is_refused(dataset, start, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(start[0], path)
    cfg, resolved = resolve(tuned(dataset, run={"init_from": str(path)}), tmp_path / "run")
    shutil.rmtree(path)
    other = jax.tree.map(lambda x: x + 1, start[1])
    checkpoint.save_params(path, other, sidecar_of(tuned(dataset, model={"max_length": 16}), dataset))
    with pytest.raises(UserError, match="is now base@7-.*was started with base@7-.*restore that checkpoint"):
        initial_state(cfg, resolved, pipeline.open_dataset(dataset), make_mesh(cfg.mesh, jax.devices()[:1]))
