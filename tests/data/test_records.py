"""Records of instruction data: published shapes, and that no field of any JSON object is dropped unsaid."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.datasets import prepare
from support.dialogues import item, prepare_dialogues, write_dialogues

from diffusionlm.data import prepare as prepare_lib
from diffusionlm.data.chat_templates import Message
from diffusionlm.data.items import parse_json, read_text
from diffusionlm.data.records import BELOW_INSTRUCTION, DIALOGUES, NUMBERING, PAIRS, SPEAKERS, read_record
from diffusionlm.errors import UserError

USER, ANSWER = Message("user", "2+2?"), Message("assistant", "4")


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (  # Dolly
            {"instruction": "Add.", "context": "2+2", "response": "4"},
            [Message("user", "Add.\n\n2+2"), ANSWER],
        ),
        (  # Alpaca, as LLaMA-Factory extends it
            {"instruction": "2+2?", "input": "", "output": "4", "system": "S", "history": [["1+1?", "2"], ["0?", "0"]]},
            [
                Message("system", "S"),
                Message("user", "1+1?"),
                Message("assistant", "2"),
                Message("user", "0?"),
                Message("assistant", "0"),
                USER,
                ANSWER,
            ],
        ),
        (  # ShareGPT
            {
                "id": "7",
                "system": "S",
                "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
            },
            [Message("system", "S"), USER, ANSWER],
        ),
        ({"prompt": "2+2?", "response": "4", "completion": None}, [USER, ANSWER]),
        ({"question": "2+2?", "answer": "4", "tags": [], "note": None, "more": {}, "text": ""}, [USER, ANSWER]),
    ],
)
def test_published_shapes_are_read_whole(record, messages):
    assert read_record(record) == (messages, [])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "response": "a", "completion": "b"}, "fit prompt+response and prompt+completion"),
        ({"instruction": "q", "output": "a", "response": "b"}, "fit instruction+output and instruction+response"),
        ({"prompt": "q", "response": "a", "messages": []}, "fit prompt+response and messages"),
        ({"messages": [], "conversations": []}, "fit messages and conversations"),
        ({"instruction": "q", "input": "x", "context": "y", "response": "a"}, "'input' and 'context' both hold"),
        ({"messages": [{"role": "system", "content": "S"}], "system": "T"}, "both the field 'system' and a first"),
        ({"prompt": "q", "response": "a", "system": 3}, "field 'system' is int, not a string"),
        ({"prompt": "q", "response": "a", "history": "q a"}, "field 'history' is str, not a list of pairs"),
        ({"prompt": "q", "response": "a", "history": [["q"]]}, "history[0] is not a pair"),
        ({"prompt": "q", "response": "a", "history": [["q", 3]]}, "history[0][1] is int, not a string"),
        ({"instruction": "q", "instances": [{"input": "", "output": "a"}]}, "of no known shape"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(record, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_record(record)


def test_an_ignored_field_counts_as_absent():
    record = {"prompt": "2+2?", "response": "4", "completion": "5"}
    assert read_record(record, ["completion"]).messages == [USER, ANSWER]
    assert read_record(record, ["response"]).messages == [USER, Message("assistant", "5")]


# Fields that some shape knows, and others.
KNOWN = sorted({*sum(PAIRS, ()), *BELOW_INSTRUCTION, *DIALOGUES, *NUMBERING, "system", "history"})
OTHERS = ["category", "inputs", "Output", "tools", "metaname"]
# Contents are told apart by a number, so that a look into the messages tells which of them were read.
texts = st.integers(0, 10**6).map(lambda n: f"<{n}>")
turns = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "name"]), texts, max_size=5).flatmap(
        lambda turn: st.sampled_from([*SPEAKERS, "tool"]).map(
            lambda speaker: turn | {key: speaker for key in ("role", "from") if key in turn}
        )
    ),
    max_size=3,
)
values = st.one_of(
    texts,
    texts,
    st.none(),
    st.just(""),
    turns,
    st.lists(st.lists(texts, min_size=1, max_size=3), max_size=2),
    st.integers(),
    st.recursive(texts, lambda inner: st.dictionaries(st.sampled_from(OTHERS), inner, max_size=2), max_leaves=3),
)
objects = st.one_of(
    st.dictionaries(st.sampled_from(KNOWN + OTHERS), values, max_size=6),
    # Most of the above fit no shape; these do.
    st.tuples(
        st.sampled_from(PAIRS).flatmap(lambda pair: st.fixed_dictionaries(dict.fromkeys(pair, texts))),
        st.dictionaries(st.sampled_from(KNOWN + OTHERS), values, max_size=3),
    ).map(lambda parts: parts[1] | parts[0]),
    st.tuples(
        st.sampled_from([*DIALOGUES.items()]).flatmap(
            lambda shape: st.fixed_dictionaries(
                {
                    shape[0]: st.lists(
                        st.fixed_dictionaries(
                            {shape[1][0]: st.sampled_from([*SPEAKERS]), shape[1][1]: texts},
                            optional={"name": texts, "weight": st.integers(), "id": texts, "note": st.just("")},
                        ),
                        max_size=3,
                    )
                }
            )
        ),
        st.dictionaries(st.sampled_from(["system", *OTHERS]), values, max_size=2),
    ).map(lambda parts: parts[1] | parts[0]),
)


def leaves(value, path=""):
    """Yield every number or text that is not empty, with its dotted field, as ignore_fields writes it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, path)
    elif value is not None and value != "":
        yield path, str(value)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(record=objects, ignored=st.sets(st.sampled_from([*KNOWN, *OTHERS, "messages.name"]), max_size=2))
@example(record={"prompt": "<1>", "response": "<2>", "completion": "<3>"}, ignored=set())
@example(record={"messages": [{"role": "user", "content": "<1>", "name": "<2>"}]}, ignored=set())
def test_every_field_is_read_named_or_ignored_or_the_record_is_refused(record, ignored):
    try:
        messages, unread = read_record(record, ignored)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    read = Counter(re.findall(r"<\d+>", " ".join(message.content for message in messages)))
    roles = Counter(message.role for message in messages)
    for path, text in leaves(record):
        top = path.partition(".")[0]
        if {path, top} & {*unread, *ignored} or top in NUMBERING or path.endswith(".id"):
            continue
        if path in ("messages.role", "conversations.from"):
            roles[SPEAKERS[text]] -= 1
            assert roles[SPEAKERS[text]] >= 0
        else:
            assert read[text] > 0, (path, messages, unread)
            read[text] -= 1
    assert not set(unread) & set(ignored)
    assert +read == Counter(), "nothing is read twice"


def test_unread_fields_are_named_once_with_a_count_and_refused(tmp_path):
    records = [{"prompt": "2+2?", "response": "4", "category": "maths"}] * 3 + [{"prompt": "?", "response": "!"}] * 2
    records.append({"messages": [{"role": "user", "content": "?", "name": "A"}, {"role": "assistant", "content": "!"}]})
    source = write_dialogues(tmp_path / "d.jsonl", records)
    expected = (
        r"the fields 'category' \(3 records\), 'messages.name' \(1 records\).*--ignore_fields category messages.name"
    )
    for on_error in ("stop", "skip"):
        with pytest.raises(UserError, match=expected) as error:
            prepare_dialogues(source, tmp_path / "out", on_error=on_error)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    ignored = ["category", "messages.name"]
    metadata = prepare_dialogues(source, tmp_path / "out", ignore_fields=ignored)
    assert metadata.splits["train"].records == 6
    assert prepare_dialogues(source, tmp_path / "out", ignore_fields=ignored[::-1]) == metadata
    with pytest.raises(UserError, match=r"another dataset \(ignore_fields=\['category', 'messages.name'\], not None"):
        prepare_dialogues(source, tmp_path / "out")


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(record=st.dictionaries(st.sampled_from(["text", *OTHERS]), values, max_size=4))
def test_every_field_of_a_text_record_is_the_text_or_named(record):
    try:
        text, unread = read_text(item(record), "text")
    except ValueError:
        assert not isinstance(record.get("text"), str)
        return
    assert text == record["text"]
    beside = {name: value for name, value in record.items() if name != "text"}
    assert set(unread) == {name for name, value in beside.items() if value not in (None, "", [], {})}


def test_fields_beside_a_text_are_named_with_a_count(tmp_path, capfd):
    records = [{"text": "word " * 9, "title": "T", "note": None}] * 5 + [{"text": "word " * 9, "url": "U"}] * 2
    source = write_dialogues(tmp_path / "d.jsonl", records)
    settings = {"tokenizer": "byte", "sequence_length": 15, "validation_fraction": 0}
    prepare_lib.prepare(str(source), tmp_path / "out", **settings)
    assert "the text is in 'text'; not read: 'title' (5 records), 'url' (2 records)\n" in capfd.readouterr().err
    prepare_lib.prepare(str(source), tmp_path / "silent", ignore_fields=["title", "url"], **settings)
    assert "not read" not in capfd.readouterr().err


def test_a_field_that_comes_twice_is_refused(tmp_path):
    """Readers differ in which of the two they take: https://www.rfc-editor.org/rfc/rfc8259#section-4."""
    twice = '{"text": "a", "text": "b"}'
    with pytest.raises(ValueError, match="the field 'text' comes twice in one object"):
        parse_json(twice)
    for name, content in (("a.jsonl", twice), ("a.json", f"[{twice}]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name}.*invalid JSON: the field 'text' comes twice in one object"):
            prepare(str(tmp_path / name), tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "ignored"),
    [
        ("chat/dolly_hhrlhf/dolly_hhrlhf_train_small.jsonl", []),
        ("chat/gpteacher/roleplay-simple-deduped-roleplay-instruct.json", []),
        ("chat/gpteacher/codegen-instruct.json", []),
        ("chat/fastchat/dummy_conversation.json", []),
        *((f"chat/alpaca_cot/{name}_train.json", []) for name in ("aqua", "creak", "ecqa", "qasc", "strategyqa")),
        ("gsm8k/test.jsonl", []),
        ("reversal_curse/name_description/validation_prompts.jsonl", []),
    ],
)
def test_real_files_are_read_whole(file, ignored, data_dir):
    content = (Path(data_dir) / file).read_text()
    records = json.loads(content) if file.endswith(".json") else [json.loads(line) for line in content.splitlines()]
    for record in records:
        messages, unread = read_record(record, ignored)
        assert len(messages) >= 2 and not unread
