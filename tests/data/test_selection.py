"""Selections: which field is the text, which documents are taken, and that what is left out is counted."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.corpus_copies import COPIES, lines, parquet
from support.datasets import prepare, rows, write_jsonl
from support.dialogues import prepare_dialogues, write_dialogues

from diffusionlm.data import tokenizers
from diffusionlm.data.items import Item, text_of
from diffusionlm.data.selection import Selection, parse_condition
from diffusionlm.errors import UserError


def item(record):
    return Item("file:1", json.dumps(record).encode(), True, 0)


def text(record, text_field):
    return Selection.of(text_field).read(item(record)).text


# --- the text


@pytest.mark.parametrize(
    ("text_field", "expected"),
    [
        ("text", "body"),
        ("meta.title", "inner"),
        ("meta.lang.code", "en"),
        ("a.b", "exact"),
        ("{text}", "body"),
        ("{meta.title}: {text}", "inner: body"),
        ("{meta.title}\n\n{text}.", "inner\n\nbody."),
        (r"{meta.title}\n\t{text}", "inner\n\tbody"),
        ("{{{text}}}", "{body}"),
        ("{text}{text}", "bodybody"),
    ],
)
def test_fields_and_templates(text_field, expected):
    record = {"text": "body", "meta": {"title": "inner", "lang": {"code": "en"}}, "a": {"b": "nested"}, "a.b": "exact"}
    assert text(record, text_field) == text_of(item(record), text_field) == expected


def test_fields_beside_the_text_are_told():
    selection = Selection.of("{meta.title}{text}", ["stars>1"])
    record = {"text": "a", "meta": {"title": "b"}, "stars": 3, "other": 1, "empty": ""}
    assert selection.read(item(record)).unread == ["other"]


@pytest.mark.parametrize(
    ("record", "text_field", "reason"),
    [
        ({"body": "a"}, "boddy", "no field 'boddy' among 'body' .*--text_field body"),
        ({"meta": {"title": "a"}}, "meta.titel", "no field 'titel' among 'title' of field 'meta'"),
        ({"meta": "a"}, "meta.title", "field 'meta' is str, which has no field 'title'"),
        ({"meta": None}, "meta.title", "field 'meta.title' is NoneType, not a string"),
        ({"title": None, "text": "a"}, "{title} {text}", "field 'title' is NoneType, not a string"),
        ({"text": "a"}, "{title} {text}", "no field 'title' among 'text'"),
        ({"text": ["a"]}, "text", "field 'text' is list, not a string"),
    ],
)
def test_a_text_that_is_not_there_is_refused(record, text_field, reason):
    with pytest.raises(ValueError, match=reason):
        text(record, text_field)


# --- conditions


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ("x=en", "en", True),
        ("x==en", "en", True),
        ("x = en", "en", True),
        ("x=en", "de", False),
        ("x!=en", "de", True),
        ("x=", "", True),
        ("x=3", 3, True),
        ("x=3", 3.0, True),
        ("x=3", "3", True),
        ("x=3.0", "3", False),  # texts are compared as texts
        ("x=three", 3, False),
        ("x!=three", 3, True),
        ("x=true", True, True),
        ("x=True", True, False),
        ("x!=true", False, True),
        ("x=en", None, False),
        ("x!=en", None, True),
        ("x>=0.5", None, False),
        ("x>=3", 3, True),
        ("x>=3", "3.0", True),
        ("x>3", 3, False),
        ("x<=-1e3", -1000, True),
        ("x<3", 2.9, True),
        ("x=a=b", "a=b", True),
        ("x=9007199254740993", 9007199254740992, False),
        ("x<9007199254740993", "9007199254740992", True),
        ("x.y=3", {"y": 3}, True),
        ("x.y=3", None, False),  # null, as the columns of a struct that is null
        ("x.y!=3", None, True),
    ],
)
def test_conditions(condition, value, holds):
    assert parse_condition(condition).holds({"x": value}) is holds


@given(st.integers(-100, 100), st.integers(-100, 100))
def test_numbers_are_compared_as_numbers(a, b):
    for operator, expected in {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "=": a == b, "!=": a != b}.items():
        assert parse_condition(f"meta.x{operator}{b}").holds({"meta": {"x": a}}) is expected


@pytest.mark.parametrize(
    ("record", "condition", "reason"),
    [
        ({"lang": "en"}, "language=en", "no field 'language' among 'lang', which where='language=en' compares"),
        ({"x": "many"}, "x>3", "field 'x' is 'many', no number as where='x>3' asks"),
        ({"x": True}, "x>0", "field 'x' is True, no number"),
        ({"x": []}, "x=a", "field 'x' is list, which where='x=a' cannot compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(record, condition, reason):
    with pytest.raises(ValueError, match=reason):
        parse_condition(condition).holds(record)


# --- datasets


@pytest.fixture
def corpus(texts):
    return [
        {"text": text, "lang": "en" if i % 3 else "de", "meta": {"score": i % 5, "title": f"title {i}"}}
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".arrow", ".records.tar.zst"])
def test_what_is_left_out_is_counted_and_the_rest_is_the_dataset(ending, corpus, tmp_path):
    (tmp_path / f"a{ending}").write_bytes(COPIES[ending](corpus))
    metadata = prepare(
        str(tmp_path / f"a{ending}"),
        tmp_path / "out",
        text_field=r"{meta.title}\n{text}",
        where=["meta.score>=2", "lang=en"],
        min_chars=50,
        max_chars=200,
    )
    english = [record for record in corpus if record["lang"] == "en"]
    good = [record for record in english if record["meta"]["score"] >= 2]
    made = [f"{record['meta']['title']}\n{record['text']}" for record in good]
    kept = [text for text in made if 50 <= len(text) <= 200]
    expected = prepare(str(write_jsonl(tmp_path / "kept.jsonl", kept)), tmp_path / "expected")
    assert metadata.sha256 == expected.sha256 and expected.left_out == {}
    # Conditions are tried in the order of their texts.
    assert metadata.left_out == {
        "where=lang=en": len(corpus) - len(english),
        "where=meta.score>=2": len(english) - len(good),
        "min_chars=50": sum(len(text) < 50 for text in made),
        "max_chars=200": sum(len(text) > 200 for text in made),
    }


def sampled(text, fraction):
    return int(hashlib.sha256(b"diffusionlm sample\0" + text.encode()).hexdigest(), 16) < fraction * 2**256


def test_a_sample_is_by_the_text_and_does_not_depend_on_what_is_held_out(tmp_path):
    texts = [f"document {i % 500}" for i in range(1000)]
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    metadata = prepare(source, tmp_path / "out", sample=0.4, validation_fraction=0.5)
    kept = [text for text in texts if sampled(text, 0.4)]
    expected = prepare(str(write_jsonl(tmp_path / "kept.jsonl", kept)), tmp_path / "kept", validation_fraction=0.5)
    assert metadata.sha256 == expected.sha256
    assert metadata.left_out == {"sample=0.4": len(texts) - len(kept)}
    counts = [split.documents for split in metadata.splits.values()]
    assert 0.35 < sum(counts) / 1000 < 0.45 and 0.4 < counts[0] / sum(counts) < 0.6
    assert prepare(source, tmp_path / "all", sample=1).left_out == {}


def test_only_options_that_are_given_belong_to_the_identity(jsonl, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out")
    assert not {"where", "min_chars", "max_chars", "sample", "selection"} & set(metadata.request)
    assert metadata.request["text_field"] == "text"
    with pytest.raises(UserError, match="another dataset .min_chars=None, not 3"):
        prepare(jsonl, tmp_path / "out", min_chars=3)
    chosen = prepare(jsonl, tmp_path / "chosen", where=["id>=3", "id<90"], sample=0.9)
    assert chosen.request["where"] == ["id<90", "id>=3"]
    assert prepare(jsonl, tmp_path / "chosen", where=["id<90", "id>=3", "id>=3"], sample=0.9) == chosen


def test_a_tokenizer_is_trained_on_what_is_taken(jsonl, texts, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out", tokenizer="sentencepiece", vocab_size=330, where=["id<60"])
    assert metadata.tokenizer["sha256"] == tokenizers.train_sentencepiece(texts[:60], 330).sha256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": ["lang"]}, "where='lang' is no condition; write field=value, field!=value or field>=number"),
        ({"where": "lang=en"}, r"where='lang=en' must be a list of conditions; write \['lang=en'\]"),
        ({"where": ["id>=many"]}, "where='id>=many' compares with 'many', which is no number"),
        ({"where": ["id>=nan"]}, "compares with 'nan', which is no number"),
        ({"where": ["lang=en"]}, r"corpus.jsonl:1: no field 'lang' among 'text', 'id', which where='lang=en' compares"),
        ({"min_chars": 0}, "min_chars=0 must be at least 1"),
        ({"max_chars": 2.5}, "max_chars=2.5 must be an integer"),
        ({"min_chars": 9, "max_chars": 8}, "min_chars=9 is more than max_chars=8"),
        ({"sample": 0}, r"sample=0 must lie in \(0, 1\]"),
        ({"sample": 1.5}, r"sample=1.5 must lie in \(0, 1\]"),
        ({"text_field": ""}, "text_field='' names no field"),
        ({"text_field": "{text"}, "text_field='{text' is no template .*; write fields as {title}"),
        ({"text_field": "{}"}, "braces enclose the name of a field alone"),
        ({"text_field": "{text:>9}"}, "braces enclose the name of a field alone"),
        ({"text_field": "{text!r}"}, "braces enclose the name of a field alone"),
        ({"text_field": "a {{text}}"}, "is a template without a field"),
        ({"min_chars": 10**6}, r"no document is left: 120 by min_chars=1000000; drop or loosen a condition"),
    ],
)
def test_refuses_selections(settings, message, jsonl, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        prepare(jsonl, tmp_path / "out", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_dialogues_are_not_selected(tmp_path):
    source = write_dialogues(tmp_path / "a.jsonl", [{"prompt": "2+2?", "response": "4", "lang": "en"}])
    for settings in ({"where": ["lang=en"]}, {"min_chars": 3}, {"sample": 0.5}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} is for format=text; choose the dialogues before"):
            prepare_dialogues(source, tmp_path / "out", **settings)


def test_nested_columns_and_objects_give_equal_rows(corpus, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(corpus))
    (tmp_path / "b.parquet").write_bytes(parquet(corpus))
    made = [
        prepare(str(tmp_path / name), tmp_path / name[0], text_field="meta.title") for name in ("a.jsonl", "b.parquet")
    ]
    assert made[0].sha256 == made[1].sha256
    assert bytes(rows(tmp_path / "a")["tokens"][0].astype("u1")).startswith(b"title 0\0title 1")  # EOS is 256
