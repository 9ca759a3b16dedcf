"""LAMBADA: passages and their last words, of which a model is given the number of tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.written_answers import EOS, gaps_as_written, lines, values

import diffusionlm as dlm
from diffusionlm.evaluation import lambada
from diffusionlm.evaluation.harness import formats


@pytest.mark.parametrize("file", ["passages_jsonl", "passages_txt"])
def test_lambada_gives_the_number_of_tokens(file, places, monkeypatch):
    seen = gaps_as_written(monkeypatch, lambda r: [" cat", " meat"][r])
    result = dlm.evaluate(places["mdm"], "lambada", data=places[file], examples=1)
    assert seen == {0: [EOS, *b"he saw the", *[None] * 4], 1: [EOS, *b"she ate all", *[None] * 5]}
    found = values(result)
    assert (found["drawn_match"], found["passages"], found["too_long"]) == (0.5, 2, 0)
    assert result.metrics["drawn_match"].stderr == pytest.approx(0.5)


def test_greedy_match_of_lambada_is_that_of_the_model(places, monkeypatch):
    gaps_as_written(monkeypatch, lambda r: "x" * 9)
    model = dlm.load(places["mdm"])
    result = dlm.evaluate(model, "lambada", data=places["passages_jsonl"])
    pairs = [("he saw the", " cat"), ("she ate all", " fish")]
    assert values(result)["greedy_match"] == np.mean(model.is_greedy(pairs))
    assert result.forwards == (1 + 4) + (1 + 5)  # one to draw, and one for each token that greedy decoding reveals


def test_the_last_word_follows_the_last_space(tmp_path):
    """Passage 426 of LAMBADA's file ends with "of", two line breaks and "Power", which are one word there."""
    (tmp_path / "one.jsonl").write_text(lines([{"text": "some kind of\n\nPower"}]))
    assert list(lambada._passages(str(tmp_path / "one.jsonl"))) == [("some kind", "of\n\nPower")]


def test_passages_are_split_as_published(tmp_path, data_dir):
    """The pairs of LAMBADA's file come out of the pairs, and of whole passages."""
    path = Path(data_dir) / "eval/lambada/lambada_openai.jsonl"
    pairs = [(pair["context"], pair["continuation"]) for pair in map(json.loads, path.read_text().splitlines())]
    passages = [{"text": f"{context} {word}"} for context, word in pairs]
    (tmp_path / "whole.jsonl").write_text(lines(passages))
    assert len(pairs) == 5153 and list(lambada._passages(str(path))) == pairs
    assert list(lambada._passages(str(tmp_path / "whole.jsonl"))) == pairs
    harness = [formats.lambada(passage, "here") for passage in passages]
    assert [(doc["context"], doc["word"]) for doc in harness] == [(context, f" {word}") for context, word in pairs]
