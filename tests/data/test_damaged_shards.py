"""Damage to a shard is refused with its name, by ArrayRecord's own hashes, or changes nothing that is read."""

import collections
import random

import pytest
from support.damage import damages, replaced
from support.datasets import SHORT_LENGTH, SHORT_TEXTS, prepare, write_jsonl

from diffusionlm.data import pipeline, stream
from diffusionlm.errors import UserError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A dataset with three training shards."""
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SHARD_TOKENS", 400)
        prepare(str(write_jsonl(folder / "text.jsonl", SHORT_TEXTS)), folder / "out", sequence_length=SHORT_LENGTH)
    assert len(list((folder / "out").glob("*array_record*"))) >= 3
    return folder / "out"


def rows(path):
    dataset = pipeline.open_dataset(path)
    return {name: values.tobytes() for name, values in dataset.rows("train", range(dataset.size("train"))).items()}


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.slow
def test_damage_to_a_shard_is_refused_by_name_or_changes_nothing(path):
    whole, rng, counts = rows(path), random.Random(0), collections.Counter()
    for shard in sorted(path.glob("*array_record*")):
        content = shard.read_bytes()
        used = [position for position, byte in enumerate(content) if byte]  # most of a small shard is filling
        flips = [(f"byte {position}", flipped(content, position)) for position in rng.sample(used, 12)]
        for damage, damaged in [*flips, *damages(content, rng, 3)]:
            with replaced(shard, damaged):
                try:
                    assert rows(path) == whole, f"{shard.name}, {damage}: read, and different"
                    counts["unchanged"] += 1
                except UserError as error:
                    message = str(error)
                    assert str(path) in message and shard.name in message and "\n" not in message, damage
                    counts["refused"] += 1
    assert counts["refused"] >= 12, counts


def test_training_batches_end_in_the_same_line(path):
    shard = sorted(path.glob("*array_record*"))[1]
    content = shard.read_bytes()
    record = next(position for position in range(200, len(content)) if content[position])
    with replaced(shard, flipped(content, record)):
        dataset = pipeline.open_dataset(path)
        with pytest.raises(UserError, match=f"is damaged: {shard.name} cannot be read"):
            next(pipeline.train_batches(dataset, batch_size=dataset.size("train"), seed=0))
