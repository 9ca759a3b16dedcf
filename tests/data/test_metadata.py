"""Incomplete datasets are refused; the format that is written is read."""

import json
import shutil

import pytest
from support.dialogues import prepare_dialogues, write_dialogues

from diffusionlm.data import pipeline
from diffusionlm.errors import UserError


def shard(folder):
    return next(folder.glob("*-train.array_record*"))


def edit(change):
    def damage(folder):
        values = json.loads((folder / "meta.json").read_text())
        change(values)
        (folder / "meta.json").write_text(json.dumps(values))

    return damage


DAMAGES = {
    "no metadata": (lambda folder: (folder / "meta.json").unlink(), "no meta.json"),
    "no directory": (shutil.rmtree, "does not exist"),
    "a shard is missing": (lambda folder: shard(folder).unlink(), "damaged: diffusionlm-train.* has 0 bytes"),
    "a shard is cut": (lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-9]), "damaged"),
    "metadata is cut": (lambda folder: (folder / "meta.json").write_text('{"format": 1,'), "truncated"),
    "metadata is no object": (lambda folder: (folder / "meta.json").write_text("[]"), "has format None, not 1"),
    "another format": (edit(lambda values: values.update(format=2)), "has format 2, not 1"),
    "a length was edited": (edit(lambda values: values.update(sequence_length=4)), "sequence_length|contradict"),
    "a key is missing": (edit(lambda values: values.pop("splits")), "missing required field `splits`"),
    "a key is too many": (edit(lambda values: values.update(extra=1)), "unknown field `extra`"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_refuses_what_is_no_whole_dataset(name, path, tmp_path):
    damage, message = DAMAGES[name]
    shutil.copytree(path, tmp_path / "copy")
    assert pipeline.open_dataset(tmp_path / "copy").metadata == pipeline.open_dataset(path).metadata
    damage(tmp_path / "copy")
    with pytest.raises(UserError, match=message) as error:
        pipeline.open_dataset(tmp_path / "copy")
    assert "\n" not in str(error.value) and str(tmp_path / "copy") in str(error.value)


def test_a_text_and_a_dialogue_dataset_have_formats_of_their_own(tmp_path):
    source = write_dialogues(tmp_path / "d.jsonl", [{"text": "word " * 40, "prompt": "2+2?", "response": "4"}] * 5)
    prepare_dialogues(source, tmp_path / "text", format="text")
    prepare_dialogues(source, tmp_path / "sft", ignore_fields=["text"])
    text, dialogues = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("text", "sft"))
    assert text["format"] == 1 and "text_field" in text["request"] and text["template"] is None
    assert dialogues["format"] == 2 and "text_field" not in dialogues["request"]
    (tmp_path / "sft" / "meta.json").write_text(json.dumps(dialogues | {"format": 1}))
    with pytest.raises(UserError, match="has format 1, not 2; prepare it again"):
        pipeline.open_dataset(tmp_path / "sft")


def test_a_dataset_of_texts_opens_without_the_fields_that_were_optional(tmp_path):
    source = write_dialogues(tmp_path / "d.jsonl", [{"text": "word " * 40}] * 5)
    metadata = prepare_dialogues(source, tmp_path / "text", format="text")
    values = json.loads((tmp_path / "text" / "meta.json").read_text())
    for name in ("template", "too_long", "bos", "checksum", "files"):
        del values[name]
    (tmp_path / "text" / "meta.json").write_text(json.dumps(values))
    assert pipeline.open_dataset(tmp_path / "text").metadata == metadata
