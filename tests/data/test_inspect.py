"""Inspecting: documents, their ends, and the statistics are those of the records."""

import json
from collections import Counter

import numpy as np
import pytest
from support.datasets import SHORT_LENGTH, SHORT_TEXTS
from support.dialogues import TWO_TURNS, expected_record, prepare_dialogues, turns, write_dialogues

from diffusionlm.data import inspect as inspect_lib
from diffusionlm.data.inspect import describe


def test_inspect_shows_documents_and_counts(path, dataset, stored, capsys):
    values = inspect_lib.inspect(path, count=2)
    printed = capsys.readouterr().out
    assert json.loads(json.dumps(values)) == values
    assert values["splits"]["train"]["documents"] == len(SHORT_TEXTS)
    tokens = sum(len(text) + 1 for text in SHORT_TEXTS)
    assert values["splits"]["train"]["bytes_per_token"] == pytest.approx((tokens - len(SHORT_TEXTS)) / tokens)
    assert values["document_tokens"]["0.5"] == np.median(
        [len(text) + 1 for text in SHORT_TEXTS][: (stored == 256).sum()]
    )
    assert values["frequent_tokens"][0]["share"] == pytest.approx(np.bincount(stored.ravel()).max() / stored.size)
    assert [record["index"] for record in values["records"]] == [0, len(stored) - 1]
    assert values["records"][0]["documents"] == [SHORT_TEXTS[0][: SHORT_LENGTH + 1]]
    assert SHORT_TEXTS[0][: SHORT_LENGTH + 1] in printed and "byte tokenizer of 257 ids" in printed


def test_inspect_marks_where_documents_end(path, dataset, capsys):
    index = int(np.flatnonzero(dataset.rows("train", range(8))["segment_ids"].max(axis=1) > 1)[0])
    pieces = inspect_lib.describe(path, count=dataset.size("train"))["records"][index]["documents"]
    assert len(pieces) == 2 and SHORT_TEXTS[0].endswith(pieces[0]) and SHORT_TEXTS[1].startswith(pieces[1])
    inspect_lib.inspect(path, count=dataset.size("train"))
    assert f"{pieces[0]} ■ end of document" in capsys.readouterr().out


def test_inspect_shows_prompts_and_answers(tmp_path):
    prepare_dialogues(write_dialogues(tmp_path / "d.jsonl", [{"messages": turns(TWO_TURNS)}] * 3), tmp_path / "out")
    values = describe(tmp_path / "out", 1)
    assert values["records"][0]["documents"] == [
        "### user\n2+2?\n\n### assistant\n",
        "4",
        "\n\n### user\nSure?\n\n### assistant\n",
        "Yes.",
    ]
    assert values["template"] == "plain" and values["packing"] == "examples"
    assert values["document_tokens"]["0.5"] == sum(part != 0 for part in expected_record(TWO_TURNS)[1])
    tokens, segments, *_ = expected_record(TWO_TURNS)
    counted = Counter(token for token, part in zip(tokens, segments, strict=True) if part)  # no padding
    frequent = values["frequent_tokens"]
    assert [token["share"] for token in frequent] == pytest.approx(
        [n / counted.total() for _, n in counted.most_common(len(frequent))]
    )
    assert all(token["share"] == pytest.approx(counted[token["id"]] / counted.total()) for token in frequent)
