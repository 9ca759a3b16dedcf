"""Checkpoints: what was saved comes back bit for bit on any mesh, and what is not whole or not ours is refused."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from diffusionlm import config, config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.checkpoint.store import CheckpointManager
from diffusionlm.errors import UserError
from diffusionlm.training.bad_batches import new_guard
from diffusionlm.training.state import TrainState

# Arrays of 1 kB or less would go into Orbax's index, and the tests that damage files could not tell the two apart.
SHAPES = {"embed": (64, 64), "blocks": {"attention": (2, 64, 96), "mlp": (2, 64, 128)}, "final_norm": (64,)}
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.constant_schedule(1e-3), mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
)


def tree_of(make, shapes):
    return jax.tree.map(make, shapes, is_leaf=lambda shape: isinstance(shape, tuple))


def make_mesh(*sizes):
    names = ("data", "fsdp")[-len(sizes) :]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def abstract_state(mesh):
    """Matrices split over fsdp along their first dimension that it divides, like the moments that belong to them."""

    def abstract(leaf):
        size = mesh.shape["fsdp"]
        split = next((i for i, n in enumerate(leaf.shape) if n % size == 0), None)
        spec = PartitionSpec() if split is None else PartitionSpec(*[None] * split, "fsdp")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = tree_of(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES)
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(integer, integer, params, jax.eval_shape(OPTIMIZER.init, params), jax.eval_shape(new_guard))
    return jax.tree.map(abstract, state)


def make_state(mesh, seed=0):
    """Every leaf random, so that no two can be exchanged, with the odd values of floating point among them."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype == jnp.int32:
            value = rng.integers(1, 1000, leaf.shape, np.int32)
        else:
            value = rng.standard_normal(leaf.shape, np.float32)
            value.flat[:4] = (-0.0, 1e-42, np.inf, np.nextafter(np.float32(1), np.float32(2)))
        return jax.device_put(value, leaf.sharding)

    return jax.tree.map(fill, abstract_state(mesh))


def make_sidecar(**changes):
    model, diffusion = config_io.to_dict(config.ModelConfig()), config_io.to_dict(config.DiffusionConfig())
    return Sidecar(**{"objective": "mdm", "model": model, "diffusion": diffusion, "mask_id": 32000, **changes})


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def save_run(workdir, *steps, keep=10, keep_every=0):
    """A run directory with checkpoints at `steps`; returns the last state."""
    with CheckpointManager(workdir, keep, keep_every) as manager:
        for step in steps:
            state = make_state(make_mesh(8), seed=step)
            manager.save(step, state, make_sidecar(source={"step": step}))
    return state


def data_file(item):
    """The file with the array data of an item."""
    return max(item.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("sizes", [(8,), (1,), (2, 4)])
def test_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, sizes):
    saved = save_run(tmp_path, 7)
    wanted = abstract_state(make_mesh(*sizes))
    with CheckpointManager(tmp_path, keep=1) as manager:
        assert manager.latest_step() == 7
        assert manager.sidecar(7) == make_sidecar(source={"step": 7})
        restored = manager.restore(wanted)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert bits(restored) == bits(saved)
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == want.sharding and leaf.dtype == want.dtype


def test_moments_keep_the_shardings_of_their_parameters(tmp_path):
    save_run(tmp_path, 1)
    with CheckpointManager(tmp_path, keep=1) as manager:
        restored = manager.restore(abstract_state(make_mesh(8)))
    adam = restored.opt_state[1][0]
    for moment in (adam.mu, adam.nu):
        assert jax.tree.map(lambda m, p: m.sharding == p.sharding, moment, restored.params) == jax.tree.map(
            lambda _: True, restored.params
        )
    assert adam.mu["embed"].addressable_shards[0].data.shape == (8, 64)


def test_save_returns_only_when_the_state_may_be_overwritten(tmp_path):
    state = make_state(make_mesh(8))
    state = state.replace(params={**state.params, "large": jnp.arange(2**20, dtype=jnp.float32)})
    before = jax.tree.map(np.array, state)  # copies
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 + 3, tree), donate_argnums=0)
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, state, make_sidecar())
        state = overwrite(state)
        jax.block_until_ready(state)
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        assert bits(manager.restore(wanted)) == bits(before)


def test_params_alone_need_no_optimizer_and_convert_to_bfloat16(tmp_path):
    saved = save_run(tmp_path, 3).params
    step = tmp_path / "checkpoints" / "3"
    shutil.rmtree(step / "train")
    for path in (tmp_path, tmp_path / "checkpoints", step, str(step)):
        assert bits(checkpoint.load_params(path)) == bits(saved)
    loaded = checkpoint.load_params(tmp_path, dtype=jnp.bfloat16)
    assert bits(loaded) == bits(jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), saved))
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {SingleDeviceSharding(jax.devices()[0])}


def test_params_load_onto_given_shardings(tmp_path):
    saved = save_run(tmp_path, 3).params
    everywhere = NamedSharding(make_mesh(2, 4), PartitionSpec())
    replicated = checkpoint.load_params(tmp_path, shardings=everywhere)
    assert bits(replicated) == bits(saved) and replicated["embed"].sharding == everywhere
    wanted = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(make_mesh(2, 4)).params)
    split = checkpoint.load_params(tmp_path, jnp.bfloat16, wanted, expected=saved)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == wanted


def test_keeps_the_newest_and_every_kth(tmp_path):
    save_run(tmp_path, *range(1, 10), keep=2, keep_every=3)
    assert sorted(os.listdir(tmp_path / "checkpoints"), key=int) == ["3", "6", "8", "9"]
    save_run(tmp_path, 10, keep=2)  # other settings on resume
    assert sorted(os.listdir(tmp_path / "checkpoints"), key=int) == ["9", "10"]
    assert checkpoint.find(tmp_path).name == "10"


def test_a_step_is_saved_once(tmp_path):
    first = save_run(tmp_path, 5)
    with CheckpointManager(tmp_path, keep=3) as manager:
        manager.save(5, make_state(make_mesh(8), seed=99), make_sidecar())
        assert manager.latest_step() == 5
        assert bits(manager.restore(abstract_state(make_mesh(8)))) == bits(first)


def test_nothing_to_restore(tmp_path):
    with CheckpointManager(tmp_path, keep=1) as manager:
        assert manager.latest_step() is None
        assert "no checkpoint" in refusal(manager.restore, abstract_state(make_mesh(8)))


def test_the_train_state_of_another_version_is_refused_and_its_parameters_are_not(tmp_path):
    state = save_run(tmp_path, 3)
    wanted = abstract_state(make_mesh(8))
    items = checkpoint._train_items(wanted)
    with pytest.MonkeyPatch.context() as patch, CheckpointManager(tmp_path, 10) as manager:
        patch.setattr(checkpoint, "_train_items", lambda state: items | {"momentum": items["step"]})
        message = refusal(manager.restore, wanted)
    assert "another version" in message and "momentum" in message and "guard" not in message
    assert bits(checkpoint.load_params(tmp_path)) == bits(state.params)


def test_another_model_is_refused_with_names_and_both_shapes(tmp_path):
    save_run(tmp_path, 1)
    wanted = abstract_state(make_mesh(1))
    params = {**wanted.params, "embed": jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=wanted.step.sharding)}
    params["head"] = params["embed"]
    for message in (
        refusal(checkpoint.load_params, tmp_path, expected=params),
        refusal(CheckpointManager(tmp_path, keep=1).restore, wanted.replace(params=params)),
    ):
        assert "embed saved (64, 64) wanted (32, 8)" in message and "head saved absent wanted (32, 8)" in message
        assert "attention" not in message
    renamed = {f"other_{name}": leaf for name, leaf in wanted.params.items()}
    assert "and 5 more" in refusal(checkpoint.load_params, tmp_path, expected=renamed)  # 4 leaves each, 3 shown
    plain = wanted.replace(opt_state=optax.sgd(1e-3, momentum=0.9).init(wanted.params))
    assert "opt_state" in refusal(CheckpointManager(tmp_path, keep=1).restore, plain)


# Interrupted and damaged.


def test_a_temporary_directory_is_never_picked_up(tmp_path):
    save_run(tmp_path, 1)
    steps = tmp_path / "checkpoints"
    interrupted = steps / "2.orbax-checkpoint-tmp"
    shutil.copytree(steps / "1", interrupted)
    assert checkpoint.find(tmp_path).name == "1"
    assert "holds only an incomplete checkpoint" in refusal(checkpoint.find, interrupted)
    with CheckpointManager(tmp_path, keep=1) as manager:
        assert manager.latest_step() == 1
        manager.save(2, make_state(make_mesh(8)), make_sidecar())
    assert os.listdir(steps) == ["2"]
    shutil.move(steps / "2", interrupted)
    assert "incomplete" in refusal(checkpoint.find, tmp_path)


PARTS = ("_CHECKPOINT_METADATA", "params/_METADATA", "params/manifest.ocdbt", "params", "sidecar")


@pytest.mark.parametrize("part", PARTS)
def test_a_step_that_lacks_a_part_is_passed_over_and_not_trained_on(tmp_path, part):
    save_run(tmp_path, 1, 2)
    broken = tmp_path / "checkpoints" / "2"
    shutil.rmtree(broken / part) if (broken / part).is_dir() else (broken / part).unlink()
    assert checkpoint.find(tmp_path).name == "1"
    assert "incomplete" in refusal(checkpoint.load_params, broken)
    assert str(broken) in refusal(CheckpointManager, tmp_path, keep=1)
    assert broken.exists()  # whose it is we cannot know


@pytest.mark.parametrize("item", ["params", "train"])
@pytest.mark.parametrize("damage", ["half", "empty", "missing", "index"])
def test_a_truncated_file_is_one_line(tmp_path, capfd, item, damage):
    save_run(tmp_path, 1)
    step = tmp_path / "checkpoints" / "1"
    path = step / item / "manifest.ocdbt" if damage == "index" else data_file(step / item)
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if damage != "empty" else 0)
    with CheckpointManager(tmp_path, keep=1) as manager:
        message = refusal(manager.restore, abstract_state(make_mesh(8)))
    assert f"cannot read the checkpoint {step}, a file is damaged or missing" in message
    if item == "params":
        assert f"cannot read the checkpoint {step}" in refusal(checkpoint.load_params, step)
    else:
        checkpoint.load_params(step)
    assert capfd.readouterr() == ("", "")


# Not ours.


def test_what_is_no_checkpoint_is_refused(tmp_path):
    assert "does not exist" in refusal(checkpoint.find, tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(checkpoint.find, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no diffusionlm checkpoint" in refusal(checkpoint.load_sidecar, tmp_path / "empty")


def test_a_checkpoint_of_something_else_is_refused_and_left_alone(tmp_path):
    foreign = tmp_path / "run" / "checkpoints" / "100"
    ocp.save(foreign, {"weights": jnp.ones(4)})
    for path in (foreign, tmp_path / "run"):
        assert "holds no diffusionlm checkpoint" in refusal(checkpoint.load_params, path)
    assert str(foreign) in refusal(CheckpointManager, tmp_path / "run", keep=1)
    np.testing.assert_array_equal(ocp.load(foreign, {"weights": np.zeros(4, np.float32)})["weights"], np.ones(4))


# The sidecar.


def test_sidecar_is_plain_json_and_round_trips(tmp_path):
    sidecar = make_sidecar(
        objective="mdm",
        pad_id=0,
        eos_id=2,
        suppressed_ids=(3, 5),
        tokenizer={"kind": "byte", "sha256": "ab"},
        canvas={"max_length": 128},
        source={"experiment": "demo", "fingerprint": "0123", "step": 4, "tokens": 512},
    )
    checkpoint.save_params(tmp_path / "model", {"embed": jnp.ones((4, 2))}, sidecar)
    assert checkpoint.load_sidecar(tmp_path / "model") == sidecar
    values = json.loads((tmp_path / "model" / "sidecar" / "data.json").read_text())
    assert (values["format"], values["version"], values["alignment"]) == ("diffusionlm", 2, "same")
    assert values["suppressed_ids"] == [3, 5] and values["model"]["d_model"] == 256 and values["bos_id"] is None


def test_a_chat_template_is_kept_as_data(tmp_path):
    """Whoever samples checks it: a reader of the sidecar needs to know nothing of templates."""
    template = {"version": 9, "anything": ["else"]}
    checkpoint.save_params(tmp_path / "model", {"embed": jnp.ones((4, 2))}, make_sidecar(template=template))
    assert checkpoint.load_sidecar(tmp_path / "model").template == template


def test_version_1_is_read_as_a_sidecar_without_a_template():
    sidecar = make_sidecar(eos_id=2)
    values = {name: value for name, value in sidecar.to_dict().items() if name != "template"}
    assert Sidecar.from_dict(values | {"version": 1}) == sidecar


@pytest.mark.parametrize(
    "change, said",
    [
        ({"version": 3}, "written by a newer diffusionlm (version 3); this one reads 2: upgrade"),
        ({"version": None}, "not of format 'diffusionlm'"),
        ({"format": "other"}, "not of format 'diffusionlm'"),
        ({"alignmnt": "same"}, "unknown field 'alignmnt'; did you mean 'alignment'?"),
        ({"alignment": "mirrored"}, "alignment='mirrored'"),
        ({"objective": "gan"}, "objective='gan'"),
        ({"model": {"d_modell": 8}}, "unknown field 'd_modell' in ModelConfig; did you mean 'd_model'?"),
        ({"diffusion": {"sigma": 8}}, "unknown field 'sigma' in DiffusionConfig"),
        ({"model": None}, "damaged"),
    ],
)
def test_a_sidecar_that_is_not_understood_is_refused(tmp_path, change, said):
    save_run(tmp_path, 1)
    path = tmp_path / "checkpoints" / "1" / "sidecar" / "data.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **change}))
    message = refusal(checkpoint.load_sidecar, tmp_path)
    assert said in message and str(path.parent.parent) in message


def test_an_incomplete_sidecar_is_refused(tmp_path):
    save_run(tmp_path, 1)
    path = tmp_path / "checkpoints" / "1" / "sidecar" / "data.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "mask_id"}))
    assert "lacks the field 'mask_id'" in refusal(checkpoint.load_sidecar, tmp_path)
    path.write_text(json.dumps(values)[:50])
    assert str(path) in refusal(checkpoint.load_sidecar, tmp_path)


# Params-only models.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("as_array", [jnp.asarray, np.asarray])
def test_a_params_only_model_keeps_values_and_dtypes(tmp_path, dtype, as_array):
    params = jax.tree.map(lambda leaf: as_array(np.asarray(leaf).astype(dtype)), make_state(make_mesh(8)).params)
    checkpoint.save_params(tmp_path / "model", params, make_sidecar())
    loaded = checkpoint.load_params(tmp_path / "model", expected=params)
    assert bits(loaded) == bits(params) and jax.tree.structure(loaded) == jax.tree.structure(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
    assert "exists" in refusal(checkpoint.save_params, tmp_path / "model", params, make_sidecar())


def test_a_small_model_is_small_on_disk_and_can_be_moved(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"embed": (1152, 128), "blocks": {"attention": (4, 128, 512), "mlp": (4, 128, 1536)}, "head": (128, 1152)}
    params = tree_of(lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16), shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 1_300_000
    checkpoint.save_params(tmp_path / "model", params, make_sidecar())
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6 and len(files) <= 12
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in files)
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    assert bits(checkpoint.load_params(tmp_path / "elsewhere")) == bits(params)


# Writing that fails.


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1 kB: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(tmp_path, capfd):
    first = save_run(tmp_path, 1)
    with CheckpointManager(tmp_path, keep=1) as manager, full_disk():
        manager.save(2, make_state(make_mesh(8), seed=2), make_sidecar())
        message = refusal(manager.wait)
    assert re.search(f"cannot write .*{tmp_path}.*: File too large", message)
    with CheckpointManager(tmp_path, keep=1) as manager:
        assert manager.latest_step() == 1
        assert bits(manager.restore(abstract_state(make_mesh(8)))) == bits(first)
    save_run(tmp_path, 2)
    assert checkpoint.find(tmp_path).name == "2"
    assert capfd.readouterr() == ("", "")


def test_a_model_that_does_not_fit_on_the_disk_leaves_nothing_to_find(tmp_path, capfd):
    params = make_state(make_mesh(8)).params
    with full_disk():
        assert str(tmp_path / "model") in refusal(checkpoint.save_params, tmp_path / "model", params, make_sidecar())
    assert "does not exist" in refusal(checkpoint.find, tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def refuses_to_write(directory, reason):
    for call in (
        lambda: CheckpointManager(directory / "run", keep=1),
        lambda: checkpoint.save_params(directory / "model", {"w": jnp.ones(2)}, make_sidecar()),
    ):
        message = refusal(call)
        assert str(directory) in message and reason in message


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    refuses_to_write(tmp_path / "file", "Not a directory")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
def test_a_read_only_directory_is_one_line(tmp_path, capfd):
    os.chmod(tmp_path, 0o500)
    refuses_to_write(tmp_path, "Permission denied")
    assert capfd.readouterr() == ("", "")


FAILURES = """
import sys
from pathlib import Path
import jax.numpy as jnp
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.errors import UserError

source, target = map(Path, sys.argv[1:])
sidecar = checkpoint.load_sidecar(source)
max((source / "params").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size).write_bytes(b"")
params = {"w": jnp.ones(9)}
for call in (lambda: checkpoint.load_params(source), lambda: checkpoint.save_params(target, params, sidecar)):
    try:
        call()
    except UserError:
        print("refused")
"""


def test_a_failure_says_nothing_on_stderr_in_a_process_of_its_own(tmp_path):
    checkpoint.save_params(tmp_path / "model", make_state(make_mesh(8)).params, make_sidecar())
    command = [sys.executable, "-c", FAILURES, tmp_path / "model", tmp_path / "model" / "commit_success.txt" / "x"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "refused\nrefused\n", "")


def test_a_task_of_somebody_else_is_still_reported(tmp_path, caplog):
    save_run(tmp_path, 1)  # from here on Orbax's are not

    async def fail(message):
        raise ValueError(message)

    async def leave():
        for message in ("DATA_LOSS: what TensorStore says", "my own mistake"):
            asyncio.get_running_loop().create_task(fail(message))
        await asyncio.sleep(0)

    asyncio.run(leave())
    gc.collect()
    assert [str(record.exc_info[1]) for record in caplog.records if record.name == "asyncio"] == ["my own mistake"]


def test_orbax_is_quiet_unless_its_log_was_asked_for(tmp_path, caplog):
    caplog.set_level(logging.INFO)  # of the root logger, as many programs set it
    save_run(tmp_path / "quiet", 1)
    assert [record for record in caplog.records if record.name == "absl"] == []
    caplog.set_level(logging.INFO, logger="absl")
    save_run(tmp_path / "loud", 1)
    assert [record for record in caplog.records if record.name == "absl"] != []
