"""Checkpoints: what was saved comes back bit for bit on any mesh, and what is not whole or not ours is refused."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp
from support.checkpoints import (
    abstract_state,
    bits,
    make_mesh,
    make_sidecar,
    make_state,
    refusal,
    save_run,
    tree_of,
)
from support.slow_cases import slow_but

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.store import CheckpointManager


@pytest.mark.parametrize("sizes", [(8,), (1,), (2, 4)])
def test_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, sizes):
    saved = save_run(tmp_path, 7)
    abstract = abstract_state(make_mesh(*sizes))
    with CheckpointManager(tmp_path, keep=1) as manager:
        assert manager.latest_step() == 7
        assert manager.sidecar(7) == make_sidecar(source={"step": 7})
        restored = manager.restore(abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert bits(restored) == bits(saved)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == expected.sharding and leaf.dtype == expected.dtype


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
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        assert bits(manager.restore(abstract)) == bits(before)


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
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(make_mesh(2, 4)).params)
    split = checkpoint.load_params(tmp_path, jnp.bfloat16, shardings, expected=saved)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == shardings


@pytest.mark.slow
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
    abstract = abstract_state(make_mesh(8))
    items = checkpoint._train_items(abstract)
    with pytest.MonkeyPatch.context() as patch, CheckpointManager(tmp_path, 10) as manager:
        patch.setattr(checkpoint, "_train_items", lambda state: items | {"momentum": items["step"]})
        message = refusal(manager.restore, abstract)
    assert "another version" in message and "momentum" in message and "guard" not in message
    assert bits(checkpoint.load_params(tmp_path)) == bits(state.params)


def test_another_model_is_refused_with_names_and_both_shapes(tmp_path):
    save_run(tmp_path, 1)
    abstract = abstract_state(make_mesh(1))
    params = {**abstract.params, "embed": jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=abstract.step.sharding)}
    params["head"] = params["embed"]
    for message in (
        refusal(checkpoint.load_params, tmp_path, expected=params),
        refusal(CheckpointManager(tmp_path, keep=1).restore, abstract.replace(params=params)),
    ):
        assert "embed saved (64, 64) wanted (32, 8)" in message and "head saved absent wanted (32, 8)" in message
        assert "attention" not in message
    renamed = {f"other_{name}": leaf for name, leaf in abstract.params.items()}
    assert "and 5 more" in refusal(checkpoint.load_params, tmp_path, expected=renamed)  # 4 leaves each, 3 shown
    plain = abstract.replace(opt_state=optax.sgd(1e-3, momentum=0.9).init(abstract.params))
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


@pytest.mark.parametrize("part", slow_but(PARTS, ("params/manifest.ocdbt", "sidecar")))
def test_a_step_that_lacks_a_part_is_passed_over_aloud_and_not_trained_on(tmp_path, part, caplog):
    save_run(tmp_path, 1, 2)
    broken = tmp_path / "checkpoints" / "2"
    shutil.rmtree(broken / part) if (broken / part).is_dir() else (broken / part).unlink()
    assert checkpoint.locate(tmp_path).to_json() == {
        "checkpoint": str(tmp_path / "checkpoints" / "1"),
        "passed_over": ["2"],
    }
    checkpoint.load_params(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'checkpoints'}: passed over step 2, which lacks a part; using step 1"
    ]
    assert "incomplete" in refusal(checkpoint.load_params, broken)
    assert str(broken) in refusal(CheckpointManager, tmp_path, keep=1)
    assert broken.exists()  # whose it is we cannot know


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
