"""Batches of mixtures: each source as it would come alone, on any number of hosts, from any batch on."""

import itertools
import json
import random
import shutil

import grain
import numpy as np
import pytest
from support.datasets import LENGTH, WORDS, prepare, write_jsonl
from support.slow_cases import slow_but

from diffusionlm.cli import main as cli
from diffusionlm.config_mixture import parse
from diffusionlm.data import inspect_mixture, mixtures, pipeline
from diffusionlm.errors import UserError

BATCH, SEED = 8, 7
DOCUMENTS = {"web": 60, "code": 25, "maths": 12}
THREE = "web=0.5,code=0.3,maths=0.2;6:web=0.1,code=0.2,maths=0.7"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three prepared datasets, each with held-out rows, in one folder."""
    folder = tmp_path_factory.mktemp("mixtures")
    draw = random.Random(0)
    for name, count in DOCUMENTS.items():
        texts = [f"{name} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(count)]
        source = write_jsonl(folder / f"{name}.jsonl", texts)
        prepare(str(source), folder / name, validation=str(source), validation_fraction=None)
    return folder


def mixed(folder, text=THREE):
    return mixtures.open_mixture(parse(text), folder)


def take(mixture, count, **settings):
    settings = {"batch_size": BATCH, "seed": SEED} | settings
    return list(itertools.islice(mixtures.train_batches(mixture, **settings), count))


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype == np.int32


def test_each_source_comes_as_it_would_alone(folder):
    """An independent reading: the shuffled, repeated rows of each source, taken one after another."""
    mixture = mixed(folder)
    plain = []
    for number, dataset in enumerate(mixture.datasets):
        rows = dataset.rows("train", range(dataset.size("train")))
        order = grain.MapDataset.range(dataset.size("train")).seed((SEED + number * 0x9E3779B1) % 2**32)
        order = order.shuffle()
        plain.append((rows, (int(index) for index in order.repeat())))
    for batch in take(mixture, 30):
        for row, source in enumerate(batch["source"].tolist()):
            rows, order = plain[source]
            number = next(order)
            for name in ("tokens", "segment_ids"):
                np.testing.assert_array_equal(batch[name][row], rows[name][number])


def test_each_epoch_of_a_source_is_a_permutation(folder):
    mixture = mixed(folder)
    batches = take(mixture, 120)
    for number, dataset in enumerate(mixture.datasets):
        drawn = np.concatenate([batch["tokens"][batch["source"] == number] for batch in batches])
        stored = dataset.rows("train", range(dataset.size("train")))["tokens"]
        size = len(stored)
        wanted = sorted(map(tuple, stored))
        for epoch in range(len(drawn) // size):
            assert sorted(map(tuple, drawn[epoch * size : (epoch + 1) * size])) == wanted
        if number:  # the small ones have been repeated
            assert len(drawn) > size


def test_one_source_with_all_rows_is_the_plain_dataset_to_the_bit_and_in_order(folder):
    plain = pipeline.train_batches(pipeline.open_dataset(folder / "web"), batch_size=BATCH, seed=SEED)
    for batch, wanted in zip(take(mixed(folder, "web=1,code=0"), 20), plain, strict=False):
        assert not batch.pop("source").any()
        assert_equal(batch, wanted)


@pytest.mark.parametrize("hosts", slow_but([2, 4, 8], [8]))
def test_hosts_read_their_rows_of_the_same_batch(folder, hosts):
    mixture, share = mixed(folder), BATCH // hosts
    parts = [take(mixture, 10, rows=np.arange(host * share, (host + 1) * share)) for host in range(hosts)]
    for k, batch in enumerate(take(mixture, 10)):
        assert_equal({name: np.concatenate([part[k][name] for part in parts]) for name in batch}, batch)


def test_any_batch_can_be_asked_for_on_both_sides_of_a_change(folder):
    mixture = mixed(folder)
    whole = take(mixture, 12)
    for start in (1, 5, 6, 7, 11):
        for batch, again in zip(whole[start:], take(mixture, 12 - start, start=start), strict=True):
            assert_equal(again, batch)


def test_sources_of_one_size_have_orders_of_their_own(folder, tmp_path):
    shutil.copytree(folder / "web", tmp_path / "other")
    (batch,) = take(mixed("", f"{folder}/web=0.5,{tmp_path}/other=0.5"), 1, batch_size=20)
    of_sources = [batch["tokens"][batch["source"] == number] for number in (0, 1)]
    assert len(of_sources[0]) == len(of_sources[1]) == 10
    assert not np.array_equal(*of_sources)


def test_what_was_seen_of_each_source(folder):
    mixture = mixed(folder, "web=0.75,code=0.25")
    seen = mixture.seen(BATCH, 10)
    assert [source["rows"] for source in seen.values()] == [60, 20]
    assert [source["share"] for source in seen.values()] == [0.75, 0.25]
    sizes = [dataset.size("train") for dataset in mixture.datasets]
    assert [source["epochs"] for source in seen.values()] == pytest.approx([60 / sizes[0], 20 / sizes[1]], abs=1e-6)
    assert mixture.seen(BATCH, 0)["web"] == {"rows": 0, "share": 0.0, "epochs": 0.0}


def test_the_identity_is_of_contents_in_their_order(folder, tmp_path):
    shutil.copytree(folder / "code", tmp_path / "code")
    one = mixed(folder, "web=0.5,code=0.5").sha256
    assert one == mixed(folder, f"web=0.3,{tmp_path}/code=0.7").sha256  # the shares are settings, and no content
    assert one != mixed(folder, "code=0.5,web=0.5").sha256 != mixed(folder, "web=0.5,maths=0.5").sha256


@pytest.fixture(scope="module")
def unlike(folder, tmp_path_factory):
    """Datasets that differ from those of the folder in one thing each."""
    directory = tmp_path_factory.mktemp("unlike")
    source = str(folder / "web.jsonl")
    prepare(source, directory / "pieces", tokenizer="sentencepiece", vocab_size=290)
    prepare(source, directory / "short", sequence_length=LENGTH - 4)
    dialogues = directory / "dialogues.jsonl"
    dialogues.write_text("".join(json.dumps({"prompt": f"p{i}", "response": "r"}) + "\n" for i in range(9)))
    prepare(str(dialogues), directory / "dialogues", format="sft", template="none")
    return directory


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pieces", "their tokenizers (sha256) differ"),
        ("short", f"their sequence_length differ, {LENGTH} and {LENGTH - 4}"),
        ("dialogues", "their packing differ, chunk and examples"),
    ],
)
def test_sources_that_do_not_go_together_are_refused_in_one_line(folder, unlike, name, said):
    with pytest.raises(UserError) as caught:
        mixed(folder, f"web=0.5,{unlike / name}=0.5")
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert str(folder / "web") in message and str(unlike / name) in message


def test_a_source_that_is_missing_is_named(folder):
    with pytest.raises(UserError, match=f"dataset '{folder}/wbe' does not exist"):
        mixed(folder, "wbe=0.5,code=0.5")


def test_inspection_shows_shares_and_epochs(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert cli.main(["data", "inspect", THREE, "--steps", "10", "--batch_size", str(BATCH), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == inspect_mixture.describe(THREE, 10, BATCH)
    rows = {name: source["rows"] for name, source in values["sources"].items()}
    exact = {"web": 24 + 3.2, "code": 14.4 + 6.4, "maths": 9.6 + 22.4}
    assert sum(rows.values()) == 80 and all(abs(rows[name] - exact[name]) < 2 for name in rows)
    assert [phase["start"] for phase in values["phases"]] == [0, 6]
    assert cli.main(["data", "inspect", THREE, "--steps", "10"]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("web", "code", "maths", "from 6", "epochs", "10 steps of 256 rows"))
    assert cli.main(["data", "inspect", "web=0.5,code=0.6"]) == 2
    assert "sum to 1.1" in capsys.readouterr().err
