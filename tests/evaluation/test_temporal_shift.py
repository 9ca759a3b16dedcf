"""Texts of different years: what each bin costs, and which bytes are counted."""

import dataclasses
import math
import unicodedata

import pytest
from support.command_line import assert_one_line
from support.written_answers import EOS, YEARS, lines, values

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.evaluation import temporal_shift


@pytest.mark.slow
def test_temporal_shift_of_a_uniform_model(places):
    """Every byte costs log V, in every bin."""
    options = {"data": places["years_jsonl"], "width": 50}
    result = dlm.evaluate(places["uniform"], "temporal_shift", **options)
    found = values(result)
    expected = {"1800-1849 ": (2, 8), "1850-1899 ": (2, 92), "": (4, 100)}
    assert len(found) == 5 * len(expected)
    for prefix, (documents, tokens) in expected.items():
        assert (found[f"{prefix}documents"], found[f"{prefix}tokens"]) == (documents, tokens)
        assert found[f"{prefix}nats_per_token"] == pytest.approx(math.log(257), rel=1e-5)
        assert found[f"{prefix}bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-5)
        assert result.metrics[f"{prefix}nats_per_token"].stderr == pytest.approx(0, abs=1e-4)
    single = dlm.evaluate(places["uniform"], "temporal_shift", data=places["years_jsonl"], first_tokens=2)
    assert values(single)["1899 tokens"] == 2 and single.metrics["1899 nats_per_token"].stderr is None


@pytest.mark.slow
def test_a_bin_costs_what_its_documents_cost(places, tmp_path):
    (tmp_path / "late.jsonl").write_text(lines(YEARS[2:]))
    shift = values(dlm.evaluate(places["arm"], "temporal_shift", data=places["years_jsonl"], width=50))
    alone = values(dlm.evaluate(places["arm"], "perplexity", data=str(tmp_path / "late.jsonl")))
    for name in ("nats_per_token", "perplexity", "bits_per_byte"):
        assert shift[f"1850-1899 {name}"] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("start", [{}, {"start_id": None}])
def test_both_tasks_of_perplexity_count_the_same_bytes(start, places, tmp_path):
    """Also of a tokenizer that adds a space to a text, which is no byte of it."""

    class Spaced(ByteTokenizer):
        def encode(self, text, *, inside=False, special=False):
            return super().encode(text if inside else f" {text}")

    (tmp_path / "texts.jsonl").write_text(lines([{"text": "\u00e9bc", "year": 1}, {"text": "defg", "year": 1}]))
    model = dlm.load(places["uniform"])
    model = dataclasses.replace(model, tokenizer=Spaced(), sidecar=dataclasses.replace(model.sidecar, canvas=start))
    tasks = ("perplexity", "temporal_shift")
    plain, shift = (values(dlm.evaluate(model, task, data=str(tmp_path / "texts.jsonl"))) for task in tasks)
    # The scored tokens are the added space, where it does not stand in for a start token, and 4 bytes of each text.
    scored = 10 if model.encode("")[:1] == [EOS] else 8
    assert plain["tokens"] == shift["tokens"] == scored and plain["bytes"] == 8
    assert plain["bits_per_byte"] == pytest.approx(math.log2(257) * scored / 8, rel=1e-5)
    assert shift["bits_per_byte"] == shift["1 bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-9)
    first = temporal_shift._read(model, str(tmp_path / "texts.jsonl"), ("text", "year"), None, 3, None)
    assert first.n_bytes == ([2, 2] if scored == 10 else [3, 3])  # of the first three scored tokens


@pytest.mark.parametrize("start", [{}, {"start_id": None}])
def test_a_part_of_a_text_has_no_bytes_of_the_rest(start, places, tmp_path):
    """Also where the tokenizer makes the rest shorter than it was: two characters are composed into one there."""

    class Composing(ByteTokenizer):
        def encode(self, text, *, inside=False, special=False):
            return super().encode(unicodedata.normalize("NFC", text))

    (tmp_path / "texts.jsonl").write_text(lines([{"text": "abcdefgh" + "e\u0301" * 500, "year": 1}]))
    model = dlm.load(places["uniform"])
    model = dataclasses.replace(model, tokenizer=Composing(), sidecar=dataclasses.replace(model.sidecar, canvas=start))
    documents = temporal_shift._read(model, str(tmp_path / "texts.jsonl"), ("text", "year"), None, 4, None)
    assert documents.n_bytes == [4] and len(documents.tokens[0]) == 5


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 3, "year": 1}, "field 'text' is int, not a string"),
        ({"text": "a", "year": 1.5}, "field 'year': 1.5 is neither an integer nor a text"),
    ],
)
def test_a_broken_field_is_named(record, message, places, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(lines([record]))
    assert cli.main(["evaluate", places["arm"], "temporal_shift", "--data", str(tmp_path / "bad.jsonl")]) == 2
    assert_one_line(capsys.readouterr(), [f"bad.jsonl:1: {message}"])
