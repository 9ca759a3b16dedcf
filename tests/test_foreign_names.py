"""A name that a file mentions stays inside the directory of that file, and nothing is written through a link."""

import base64
import json
import os
import threading

import numpy as np
import pytest
from support.datasets import prepare, write_jsonl
from support.foreign_weights import make_source, save_native
from support.tiny_sweep import MODEL, PER_STEP, RECIPE
from support.tokenizer_files import write_byte_level

import diffusionlm as dlm
from diffusionlm import storage
from diffusionlm.data import tokenizers
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.data.tokenizers.huggingface_files import digest
from diffusionlm.errors import UserError
from diffusionlm.interop import safetensors
from diffusionlm.ownership import claims, conditional_writes
from diffusionlm.scaling.sweep.lease import Leases
from diffusionlm.scaling.sweep.recipe import Sweep, grid

NAMES = ["../escaped", "{outside}/escaped", "sub/escaped", "..", "", "esc\x1b[2Japed"]
OF_EXPORTS = ["config.json", "model.safetensors", ".bashrc"]  # plain, but no tokenizer's


@pytest.fixture
def outside(tmp_path):
    """Return a directory that nothing may be written to."""
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "escaped").write_text("precious")
    yield directory
    assert os.listdir(directory) == ["escaped"] and (directory / "escaped").read_text() == "precious"


def refuse(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    return message


def stored_tokenizer(directory, name):
    """Return a stored tokenizer with one file more, of that name."""
    values = tokenizers.load(str(write_byte_level(directory))).to_dict()
    files = {key: base64.b64decode(text) for key, text in values["files"].items()} | {name: b"harm"}
    encoded = {key: base64.b64encode(content).decode() for key, content in files.items()}
    return values | {"files": encoded, "sha256": digest(files, values["family"], values["ids"])}


@pytest.mark.parametrize("name", NAMES + OF_EXPORTS)
def test_a_stored_tokenizer_has_no_other_files_than_ours(name, tmp_path, outside):
    values = stored_tokenizer(tmp_path, name.format(outside=outside))
    assert "the stored tokenizer names the file" in refuse(lambda: tokenizers.from_dict(values))


@pytest.mark.parametrize("name", NAMES[:2])
def test_export_writes_no_file_of_another_name(name, tmp_path, outside):
    save_native(tmp_path / "model")
    sidecar = tmp_path / "model" / "sidecar" / "data.json"
    tokenizer = stored_tokenizer(tmp_path, name.format(outside=outside))
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"tokenizer": tokenizer}))
    refuse(lambda: dlm.export_weights(tmp_path / "model", tmp_path / "out" / "made", "llama"))
    assert not list((tmp_path / "out").glob("*")) and not (tmp_path / "out" / "escaped").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_index_of_weights_names_files_beside_it(name, tmp_path, outside):
    name = name.format(outside=outside)
    index = {"weight_map": {"wte.weight": name}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / safetensors.INDEX).write_text(json.dumps(index))
    message = refuse(lambda: safetensors.find(tmp_path / "model"))
    assert safetensors.INDEX in message and "inside its directory" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_dataset_names_shards_beside_it(name, tmp_path, outside):
    prepare(str(write_jsonl(tmp_path / "text.jsonl", ["some text"] * 9)), tmp_path / "made")
    meta = json.loads((tmp_path / "made" / "meta.json").read_text())
    meta["splits"]["train"]["shards"][name.format(outside=outside)] = len("precious")
    (tmp_path / "made" / "meta.json").write_text(json.dumps(meta))
    assert "meta.json" in refuse(lambda: open_dataset(tmp_path / "made"))


@pytest.mark.parametrize("name", ["../escaped", "a/b", "esc\x1b[2Japed"])
def test_the_cells_of_a_sweep_are_names_of_directories(name):
    cells = grid(RECIPE, objectives=("mdm",), sizes={name: MODEL}, budgets=(100.5 * PER_STEP,))
    assert "sweep 'tiny' names the file" in refuse(lambda: Sweep(cells=tuple(cells), name="tiny"))


def test_weights_that_are_links_into_a_cache_are_read(tmp_path):
    source = make_source("gpt2", tmp_path / "source")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs").mkdir()
    for file in source.iterdir():
        file.rename(tmp_path / "blobs" / file.name)
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    for tensor in safetensors.find(tmp_path / "snapshot").values():
        assert np.isfinite(tensor.read()).all()


def test_no_name_of_a_temporary_file_can_be_foreseen(tmp_path, monkeypatch):
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (names.append(source), replace(source, target)))
    for _ in range(20):
        storage.write_atomically(tmp_path / "file", "content")
    assert len(set(names)) == 20 and {os.path.dirname(name) for name in names} == {str(tmp_path)}
    assert os.listdir(tmp_path) == ["file"]


def test_a_temporary_name_that_is_taken_is_not_opened(tmp_path, outside, monkeypatch):
    monkeypatch.setattr(storage.uuid, "uuid4", lambda: type("Known", (), {"hex": "known"}))
    (tmp_path / ".diffusionlm-known.tmp").symlink_to(outside / "escaped")
    with pytest.raises(FileExistsError):
        storage.write_atomically(tmp_path / "file", "harm")
    assert not (tmp_path / "file").exists()


def test_a_file_that_is_a_link_is_replaced_and_not_followed(tmp_path, outside):
    for write in (
        lambda path: storage.write_atomically(path, "new"),
        lambda path: storage.JsonLines(path).write({"step": 1}),
    ):
        (tmp_path / "file").unlink(missing_ok=True)
        (tmp_path / "file").symlink_to(outside / "missing")
        write(tmp_path / "file")
        assert not (tmp_path / "file").is_symlink()


def test_lines_are_not_appended_through_a_link(tmp_path, outside):
    lines = storage.JsonLines(tmp_path / "lines")
    (tmp_path / "lines").unlink()
    (tmp_path / "lines").symlink_to(outside / "escaped")
    with pytest.raises(OSError):
        lines.write({"step": 1})


def test_a_lease_is_not_written_through_a_link(tmp_path, outside):
    leases = Leases(tmp_path / "leases")
    (tmp_path / "leases").mkdir(exist_ok=True)
    (tmp_path / "leases" / "cell.__lock").symlink_to(outside / "escaped")
    with pytest.raises(OSError, match="symbolic link"):
        leases.claim("cell")
    with pytest.raises(OSError, match="symbolic link"):
        conditional_writes.write_once(tmp_path / "leases", "cell", "harm")


def test_a_name_of_an_abandoned_directory_may_be_a_pipe_or_a_link(tmp_path, outside):
    os.mkfifo(tmp_path / ".made.partial-pipe")
    (tmp_path / ".made.partial-link").symlink_to(outside)

    def make():
        with claims.whole_directory(tmp_path / "made") as directory:
            (directory / "file").write_text("whole")

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(30)
    assert (tmp_path / "made" / "file").read_text() == "whole"
