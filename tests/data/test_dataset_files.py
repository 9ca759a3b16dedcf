"""The JSON of a dataset is believed only as far as it is what `prepare` writes: counts, features, places of records."""

import json
import logging
import shutil
import sys

import hypothesis
import msgspec
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies as st
from support import datasets, mutated_json
from support.dialogues import prepare_dialogues, write_dialogues

from diffusionlm.data import metadata as metadata_lib
from diffusionlm.data import pipeline, stream, tfds_files
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError

FILES = ("meta.json", tfds_files.FEATURES, tfds_files.INFO)
COUNTS = ("records", "documents", "tokens", "raw_bytes", "token_bytes")
SETTINGS = hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    source = datasets.write_jsonl(folder / "t.jsonl", [f"document {i}" for i in range(40)])
    datasets.prepare(str(source), folder / "made", validation_fraction=0.2)
    return folder / "made"


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues")
    rows = [{"prompt": f"{i}+{i}?", "response": str(2 * i)} for i in range(9)]
    prepare_dialogues(str(write_dialogues(folder / "d.jsonl", rows)), folder / "made")
    return folder / "made"


@pytest.fixture
def copied(texts, tmp_path):
    return epath.Path(shutil.copytree(texts, tmp_path / "copy"))


def contents(folder):
    return {name: json.loads((folder / name).read_text()) for name in FILES}


def of_before(values):
    return {name: value for name, value in values.items() if name not in ("checksum", "files")}


def write(folder, name, values):
    (folder / name).write_text(json.dumps(values))


def refusal(folder):
    with pytest.raises(UserError) as caught:
        pipeline.open_dataset(folder)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 900
    return message


@pytest.mark.slow
@SETTINGS
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("kind", ["texts", "dialogues"])
def test_any_change_of_a_dataset_s_json_is_refused(kind, data, request, tmp_path):
    """But for one that changes nothing: a list or an object in another order is another file, a space is none."""
    made = request.getfixturevalue(kind)
    folder = tmp_path / "copy"
    if not folder.exists():
        shutil.copytree(made, folder)
    name = data.draw(st.sampled_from(FILES))
    valid = json.loads((made / name).read_text())
    mutation = data.draw(mutated_json.mutations(valid))
    write(folder, name, mutation.values)
    try:
        if mutation.values != valid:
            refusal(folder)
    finally:
        shutil.copy(made / name, folder / name)


@pytest.mark.slow
@SETTINGS
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("kind", ["texts", "dialogues"])
def test_a_dataset_of_before_with_one_change_is_refused_or_makes_sense(kind, data, request, tmp_path):
    made = request.getfixturevalue(kind)
    folder = tmp_path / "copy"
    if not folder.exists():
        shutil.copytree(made, folder)
    valid = of_before(json.loads((made / "meta.json").read_text()))
    mutation = data.draw(mutated_json.mutations(valid, exclude=("request",)))
    write(folder, "meta.json", mutation.values)
    try:
        dataset = pipeline.open_dataset(folder)
        tokenizer = dataset.tokenizer
    except UserError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error) and len(str(error)) < 900
        return
    metadata = dataset.metadata
    assert metadata.sha256 == pipeline.open_dataset(made).metadata.sha256  # so all that the records are made of
    assert mutation.kind != "extra" or mutation.values == valid
    for split in metadata.splits.values():
        assert all(type(getattr(split, count)) is int and getattr(split, count) > 0 for count in COUNTS)
        assert split.raw_bytes == split.token_bytes  # of bytes, so a bits per byte cannot be wrong
    assert metadata.vocab_size == tokenizer.vocab_size


def test_counts_that_the_identity_leaves_out_are_in_the_checksum(copied):
    valid = contents(copied)["meta.json"]
    for count in ("raw_bytes", "token_bytes", "documents"):
        values = json.loads(json.dumps(valid))
        values["splits"]["validation"][count] += 1
        write(copied, "meta.json", values)
        assert "was changed after it was written" in refusal(copied)
    values["splits"]["validation"] |= {"raw_bytes": 0, "documents": 6}
    write(copied, "meta.json", values)
    assert "splits.validation.raw_bytes=0: Expected `int` >= 1" in refusal(copied) or "raw_bytes" in refusal(copied)


def test_a_dataset_of_before_is_read_and_says_once_that_it_cannot_be_verified(copied, caplog):
    metadata = pipeline.open_dataset(copied).metadata
    write(copied, "meta.json", of_before(contents(copied)["meta.json"]))
    with caplog.at_level(logging.WARNING):
        assert [pipeline.open_dataset(copied).metadata for _ in range(2)] == [metadata, metadata]
    assert [record.message for record in caplog.records if "cannot be verified" in record.message] == [
        f"dataset {copied} was prepared by an earlier version, without checksums: its counts cannot be verified"
    ]


def test_bytes_of_a_lossless_tokenizer_are_equal_in_a_dataset_of_before(copied):
    values = of_before(contents(copied)["meta.json"])
    values["splits"]["validation"]["raw_bytes"] = 1
    write(copied, "meta.json", values)
    with pytest.raises(UserError, match="raw_bytes=1 and token_bytes=.* which are equal for this tokenizer"):
        _ = pipeline.open_dataset(copied).tokenizer


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("place", ["top", "tokens"])
def test_no_module_that_features_json_names_is_imported(copied, tmp_path, monkeypatch, before, place):
    module = tmp_path / "harmful_features.py"
    module.write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    files = contents(copied)
    if before:
        write(copied, "meta.json", of_before(files["meta.json"]))
    features = files[tfds_files.FEATURES]
    target = features if place == "top" else features["featuresDict"]["features"]["tokens"]
    target["pythonClassName"] = "harmful_features.Features"
    write(copied, tfds_files.FEATURES, features)
    message = refusal(copied)
    assert tfds_files.FEATURES in message and "harmful_features" not in sys.modules


@pytest.mark.parametrize("vocab_size, length", [(257, 16), (70_001, 16), (257, 70_001)])
def test_features_are_what_tfds_writes(vocab_size, length, tmp_path):
    record_format = stream.RecordFormat(length - 1, vocab_size, 0)
    record_format.features().save_config(tmp_path)
    assert json.loads((tmp_path / tfds_files.FEATURES).read_text()) == tfds_files.features(vocab_size, length)


@pytest.mark.parametrize("vocab_size, length", [(257, 16), (70_001, 300)])
def test_records_are_those_of_tfds_in_a_fixed_order(vocab_size, length):
    record_format = stream.RecordFormat(length - 1, vocab_size, 0)
    rng, serializer = np.random.default_rng(0), record_format.features()
    arrays = {name: rng.integers(1, 200, length).astype(dtype) for name, dtype in record_format.dtypes.items()}
    record = tfds_files.serialize(arrays)
    assert record == tfds_files.serialize(dict(reversed(arrays.items())))
    assert record.index(b"segment_ids") < record.index(b"tokens")
    assert sorted(record) == sorted(serializer.serialize_example(arrays)), "the same bytes in some order"
    read = serializer.deserialize_example_np(record)
    assert {name: array.tolist() for name, array in read.items()} == {n: array.tolist() for n, array in arrays.items()}


def test_dataset_info_agrees_with_the_metadata(copied):
    info = contents(copied)[tfds_files.INFO]
    write(copied, "meta.json", of_before(contents(copied)["meta.json"]))
    splits = info["splits"]
    for change, reason in (
        ({"splits": splits[:1]}, "has the splits train, and meta.json train, validation"),
        ({"splits": [splits[0], splits[1], splits[0]]}, "has the splits train, validation, train"),
        ({"splits": [splits[0] | {"shardLengths": ["1"]}, splits[1]]}, "has 1 records in 1 shards of split 'train'"),
        ({"splits": [splits[0] | {"filepathTemplate": "/etc/passwd"}, splits[1]]}, "filepathTemplate=/etc"),
        ({"fileFormat": "riegeli"}, "fileFormat"),
        ({"moduleName": "harmful"}, "unknown field `moduleName`"),
    ):
        write(copied, tfds_files.INFO, info | change)
        assert reason.split("=")[0] in refusal(copied)


@pytest.mark.parametrize("name", [tfds_files.FEATURES, tfds_files.INFO])
def test_a_missing_file_of_tfds_is_named(copied, name):
    (copied / name).unlink()
    assert f"lacks {name}" in refusal(copied)


def test_metadata_round_trips(copied):
    metadata = pipeline.open_dataset(copied).metadata
    assert msgspec.convert(msgspec.to_builtins(metadata), metadata_lib.Metadata) == metadata
    assert metadata.vocab_size == ByteTokenizer.vocab_size
