"""Damage to any file of a checkpoint is refused with its name, or changes nothing that is read."""

import collections
import json
import logging
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from etils import epath
from support.checkpoints import (
    abstract_state,
    bits,
    make_mesh,
    make_sidecar,
    make_state,
    refusal,
    save_run,
)
from support.damage import outcomes, replaced

from diffusionlm.checkpoint import integrity, store
from diffusionlm.checkpoint.store import CheckpointManager

KINDS = ("trained", "params-only", "imported")

# Orbax drops the parts of a read that were in flight when another part failed.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint of each kind: its directory, which tests leave as they find it."""
    directory = tmp_path_factory.mktemp("checkpoints")
    state = save_run(directory / "run", 1)
    store.save_params(directory / "small", state.params, make_sidecar())
    weights = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), state.params)
    store.save_params(directory / "imported", weights, make_sidecar(), compress=False)
    return dict(zip(KINDS, (directory / "run/checkpoints/1", directory / "small", directory / "imported"), strict=True))


def readers_of(path, kind):
    def subset():
        return {name: leaf.tobytes() for name, leaf in store.load_subset(path, store.param_shapes(path)).items()}

    readers = {"load_params": lambda: bits(store.load_params(path)), "load_subset": subset}
    readers["load_sidecar"] = lambda: store.load_sidecar(path).to_dict()
    if kind == "trained":
        manager, abstract = CheckpointManager(path.parents[1], keep=9), abstract_state(make_mesh(8))
        readers["restore"] = lambda: bits(manager.restore(abstract))
    return readers


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "trained" else kind for kind in KINDS]
)
def test_damage_to_any_file_is_refused_by_name_or_changes_nothing(checkpoints, kind):
    outcomes(checkpoints[kind], readers_of(checkpoints[kind], kind), random.Random(0), count=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_to_any_file_is_refused_by_name_or_changes_nothing(checkpoints, kind, capsys):
    path, seed = checkpoints[kind], random.randrange(1 << 32)
    counts = outcomes(path, readers_of(path, kind), random.Random(seed), count=12)
    totals = collections.Counter()
    for (file, reader, outcome), count in counts.items():
        totals[file.split("/")[0], reader, outcome] += count
    with capsys.disabled():
        print(f"\n{kind}, seed {seed}: {sum(totals.values())} reads of damaged files")
        for (part, reader, outcome), count in sorted(totals.items()):
            print(f"  {part:22} {reader:12} {outcome:9} {count}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_ends_its_chunks_with_a_checksum(checkpoints, kind):
    """Orbax has no option for it: a version that writes arrays in another way must not go unnoticed."""
    path = checkpoints[kind]
    for item in ("params", "train") if kind == "trained" else ("params",):
        files = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path / item}/"}).result()
        arrays = [key for key in files.list().result() if key.endswith(b"zarr.json")]
        assert arrays
        for key in arrays:
            (sharding,) = json.loads(files.read(key).result().value)["codecs"]
            codec = sharding["configuration"]["codecs"][-1]
            assert codec == {"name": "crc32c"} or codec["configuration"]["checksum"] is True, key
            assert (codec["name"] == "zstd") == (kind != "imported")


@pytest.mark.parametrize("name", ["embed", "blocks/attention", "blocks/mlp"])
def test_a_flipped_bit_of_an_array_names_it_whoever_reads(checkpoints, name):
    path = checkpoints["imported"]
    (array,) = store.load_subset(path, {name: store.param_shapes(path)[name]}).values()
    data = array.tobytes()  # it is not compressed
    file = next(file for file in path.glob("params/ocdbt.process_0/d/*") if data in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(data) + array.nbytes // 2] ^= 1
    readers = readers_of(path, "imported")
    with replaced(file, bytes(content)):
        for reader in ("load_params", "load_subset"):
            message = refusal(readers[reader])
            assert f"{path}, a file of params/ is damaged or missing" in message
            assert f"the array {name.replace('/', '.')} differs from what was written" in message
        others = {other: shape for other, shape in store.param_shapes(path).items() if other != name}
        assert store.load_subset(path, others).keys() == others.keys()  # only what is read is checked
        store.load_sidecar(path)


def without_an_array(values):
    values["tree_metadata"].popitem()


CHANGES = {
    "params/_METADATA": ("load_params", without_an_array),
    "train/_METADATA": ("restore", without_an_array),
    "sidecar/data.json": ("load_sidecar", lambda values: values["source"].update(step=2)),
    "integrity/data.json": ("load_sidecar", lambda values: values.update(chunks="none")),
}


@pytest.mark.parametrize("file", CHANGES)
def test_json_that_is_still_valid_is_compared_with_what_was_saved(checkpoints, file):
    path = checkpoints["trained"]
    reader, change = CHANGES[file]
    values = json.loads((path / file).read_text())
    change(values)
    with replaced(path / file, json.dumps(values).encode()):
        message = refusal(readers_of(path, "trained")[reader])
    assert message.startswith(f"{path / file} is damaged: it differs from what was saved")


def test_white_space_and_the_order_of_fields_are_not_damage(checkpoints):
    file = checkpoints["params-only"] / "sidecar/data.json"
    fields = json.loads(file.read_text())
    with replaced(file, json.dumps(dict(reversed(fields.items())), indent=2).encode()):
        assert store.load_sidecar(checkpoints["params-only"]) == make_sidecar()


def test_a_checkpoint_of_before_is_read_and_said_once_to_be_unverifiable(checkpoints, tmp_path, caplog):
    shutil.copytree(checkpoints["params-only"], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "integrity")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert store.load_sidecar(tmp_path / "model") == make_sidecar()
            assert bits(store.load_params(tmp_path / "model")) == bits(make_state(make_mesh(8), seed=1).params)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("diffusionlm")] == [
        f"{tmp_path / 'model'} has no checksums (it is of an earlier version, or a part of it is missing): "
        "damage cannot be noticed"
    ]


def test_a_new_checkpoint_says_nothing(checkpoints, caplog):
    with caplog.at_level(logging.WARNING):
        store.load_params(checkpoints["params-only"])
    assert not caplog.records


@pytest.mark.parametrize("name", ["tinystories", "tinystories_arm"])
def test_the_models_of_this_repository_can_be_verified(name):
    path = epath.Path(__file__).parents[2] / "docs/results/models" / name
    digests = integrity.read(path)
    assert digests and digests.chunks == "checksums"
    store.load_params(path)


def test_the_digests_of_another_checkpoint_are_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints["params-only"], tmp_path / "model")
    store.save_params(tmp_path / "other", {"w": jnp.ones(3)}, make_sidecar(eos_id=3))
    shutil.copy(tmp_path / "other/integrity/data.json", tmp_path / "model/integrity/data.json")
    assert "sidecar/data.json is damaged" in refusal(store.load_sidecar, tmp_path / "model")
    assert "params/_METADATA is damaged" in refusal(store.load_params, tmp_path / "model")
