"""Instruction data: every format, dialogues as records, what is left out, and which answer a batch is about."""

import functools
import hashlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.dialogues import (
    BYTE,
    EOS,
    LENGTH,
    QUESTION,
    TWO_TURNS,
    expected_record,
    item,
    prepare_dialogues,
    turns,
    write_dialogues,
)

from diffusionlm.data import chat_templates as templates
from diffusionlm.data import dialogues as sft
from diffusionlm.data import pipeline, stream, text_files
from diffusionlm.data.chat_templates import Message
from diffusionlm.errors import UserError

# --- formats


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "2+2?", "response": "4"}, QUESTION),
        ({"prompt": "2+2?", "completion": "4", "id": 3}, QUESTION),
        ({"question": "2+2?", "answer": "4"}, QUESTION),
        ({"instruction": "2+2?", "input": "", "output": "4"}, QUESTION),
        ({"instruction": "2+2?", "response": "4"}, QUESTION),
        (
            {"instruction": "Add", "input": "2+2", "output": "4"},
            [Message("user", "Add\n\n2+2"), Message("assistant", "4")],
        ),
        ({"messages": turns(TWO_TURNS)}, TWO_TURNS),
        ({"messages": turns([Message("system", "S"), *QUESTION])}, [Message("system", "S"), *QUESTION]),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, QUESTION),
        ({"messages": turns([*QUESTION, Message("user", "Sure?")])}, QUESTION),  # nobody answered
        ({"messages": turns([*QUESTION, Message("user", "Sure?"), Message("assistant", " ")])}, QUESTION),
        ({"prompt": "2+2?", "response": " \n"}, []),
        ({"messages": turns([Message("assistant", "Hello!")])}, []),
        ({"messages": []}, []),
    ],
)
def test_formats_are_known_by_their_fields(record, messages):
    assert sft.read(item(record)).messages == messages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "2+2?", "chosen": "4"},
            "fields 'prompt', 'chosen' are of no known shape; known: prompt+response, ",
        ),
        ({}, "fields none are of no known shape"),
        ({"prompt": 4, "response": "4"}, "field 'prompt' is int, not a string"),
        ({"prompt": "2+2?", "completion": None}, "field 'completion' is NoneType, not a string"),
        ({"question": "2+2?", "answer": ["4"]}, "field 'answer' is list, not a string"),
        ({"instruction": "Add", "input": 4, "output": "4"}, "field 'input' is int, not a string"),
        ({"messages": "hello"}, "field 'messages' is str, not a list of messages"),
        ({"messages": [{"role": "user"}]}, "messages[0] is not an object with the fields 'role' and 'content'"),
        (
            {"messages": [{"role": "tool", "content": ""}]},
            "messages[0] is by 'tool'; known: system, user, assistant",
        ),
        ({"messages": [{"role": ["user"], "content": ""}]}, "messages[0] is by ['user']; known: system"),
        ({"messages": [{"role": {"a": 1}, "content": ""}]}, "messages[0] is by {'a': 1}; known: system"),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0]['value'] is int, not a string"),
        ([1], "a JSON list, not an object"),
    ],
)
def test_records_of_no_known_shape_are_refused_in_one_line(record, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        sft.read(item(record))
    source = write_dialogues(tmp_path / "data.jsonl", [record])
    with pytest.raises(UserError, match=rf"data\.jsonl:1: {re.escape(message)}.*--on_error skip") as error:
        prepare_dialogues(source, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_sources_and_settings_that_do_not_suit_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.json").write_text('{"prompt": "2+2?",\n"response": "4"}')
    (tmp_path / "b.json").write_text("[")
    good = write_dialogues(tmp_path / "good.jsonl", [{"prompt": "2+2?", "response": "4"}] * 9)
    empty = write_dialogues(tmp_path / "empty.jsonl", [{"prompt": "2+2?", "response": ""}] * 9)
    for source, settings, message in (
        (
            tmp_path / "a.txt",
            {"validation_fraction": None},
            "format=sft reads files of records, not '.*a.txt'; give files that end in .jsonl, ",
        ),
        (
            [tmp_path / "good.jsonl", tmp_path / "a.txt"],
            {},
            "format=sft reads files of records, not '.*a.txt'; give files that end in .jsonl, ",
        ),
        (
            good,
            {"validation": "tfds:no_such", "validation_fraction": None},
            "perhaps with .gz or .zst, not tfds:no",
        ),
        (good, {"text_field": "prompt"}, "text_field='prompt' is for format=text"),
        (tmp_path / "a.json", {}, "one JSON object over several lines"),
        (tmp_path / "b.json", {}, "invalid JSON"),
        (
            "python_docs",
            {"validation_fraction": None},
            "format=sft reads files that end in .jsonl, .json, .* not python_docs",
        ),
        (good, {"format": "chat"}, "format='chat' must be 'text' or 'sft'"),
        (good, {"format": "text", "template": "plain"}, "template='plain' is for format=sft"),
        (good, {"template": "lama"}, "unknown template 'lama'"),
        (good, {"sequence_length": 10}, "split 'train': all 9 answers end beyond 10 tokens; use a longer sequence_len"),
        (good, {"validation_fraction": 1e-9}, "validation_fraction=1e-09 holds out none of 9 dialogues"),
        (empty, {}, "split 'train' has no answer"),
        (good, {"validation": str(empty), "validation_fraction": None}, "split 'validation' has no answer"),
        (good, {"tokenizer": str(tmp_path)}, "unknown tokenizer"),
    ):
        with pytest.raises(UserError, match=message) as error:
            prepare_dialogues(source, tmp_path / "out", **settings)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


# --- records


def rows(path, split="train"):
    dataset = pipeline.open_dataset(path)
    return dataset.rows(split, range(dataset.size(split)))


def test_a_record_is_a_dialogue_with_its_parts(tmp_path):
    system = [Message("system", "Be brief."), *QUESTION]
    records = [{"messages": turns(messages)} for messages in (QUESTION, TWO_TURNS, system)]
    source = write_dialogues(tmp_path / "d.jsonl", records)
    metadata = prepare_dialogues(source, tmp_path / "out")
    stored = rows(tmp_path / "out")
    for r, messages in enumerate((QUESTION, TWO_TURNS, system)):
        tokens, segments = expected_record(messages)
        assert stored["tokens"][r].tolist() == tokens
        assert stored["segment_ids"][r].tolist() == segments
    assert (metadata.packing, metadata.template["name"]) == ("examples", "plain")
    assert (metadata.too_long, metadata.empty) == (0, 0)
    split = metadata.splits["train"]
    assert (split.records, split.documents, split.tokens, split.raw_bytes) == (3, 4, 2 + 2 + 5 + 2, 1 + 1 + 4 + 1)
    assert split.token_bytes == split.raw_bytes
    assert pipeline.open_dataset(tmp_path / "out").metadata == metadata


def test_answers_that_end_beyond_the_length_are_left_out_and_counted(tmp_path):
    """With its EOS an answer must end within sequence_length; what follows it in a dialogue goes with it."""
    before = len("### user\n2+2?\n\n### assistant\n") + 1
    fits, exceeds = ("x" * n for n in (LENGTH - before - 1, LENGTH - before))
    long = [*QUESTION, Message("user", "y" * LENGTH), Message("assistant", "No"), Message("user", "!"), TWO_TURNS[3]]
    records = [
        {"prompt": "2+2?", "response": fits},
        {"prompt": "2+2?", "response": exceeds},
        {"prompt": "2+2?", "response": ""},
        {"messages": turns(long)},
    ]
    metadata = prepare_dialogues(write_dialogues(tmp_path / "d.jsonl", records), tmp_path / "out")
    split = metadata.splits["train"]
    assert (metadata.too_long, metadata.empty, split.records, split.documents) == (3, 1, 2, 2)
    stored = rows(tmp_path / "out")
    assert (stored["segment_ids"][0] != 0).sum() == LENGTH
    assert stored["tokens"][1].tolist() == expected_record(QUESTION)[0]


def test_lists_and_lines_give_the_same_records(tmp_path):
    records = [{"prompt": f"{i}?", "response": f"{i} é 😀"} for i in range(9)]
    lines = prepare_dialogues(write_dialogues(tmp_path / "d.jsonl", records), tmp_path / "lines")
    (tmp_path / "d.json").write_text(json.dumps(records, indent=1))
    assert prepare_dialogues(tmp_path / "d.json", tmp_path / "list").sha256 == lines.sha256
    assert prepare_dialogues(tmp_path / "d.jsonl", tmp_path / "none", template="none").sha256 != lines.sha256


def test_a_directory_of_dialogues_is_its_lines_and_lists(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README.md").write_text("about")
    (tmp_path / "in" / "a.json").write_text(json.dumps([{"prompt": "2+2?", "response": "4"}]))
    write_dialogues(tmp_path / "in" / "b.jsonl", [{"prompt": "3+3?", "response": "6"}] * 2)
    assert prepare_dialogues(tmp_path / "in", tmp_path / "out").splits["train"].records == 3


def cut(monkeypatch, piece_bytes):
    """Cut sources into pieces of so many bytes."""
    pieces = functools.partialmethod(text_files.Files.pieces, piece_bytes=piece_bytes, group_bytes=1)
    monkeypatch.setattr(text_files.Files, "pieces", pieces)


@pytest.mark.parametrize("piece_bytes", [1, 300, 1 << 20])
def test_the_identity_is_that_of_the_content_however_it_was_read(piece_bytes, tmp_path, monkeypatch):
    """All words, then all lengths."""
    records = [{"prompt": f"{i}?", "response": "y" * i} for i in range(20)]
    cut(monkeypatch, piece_bytes)
    metadata = prepare_dialogues(write_dialogues(tmp_path / "d.jsonl", records), tmp_path / "out")
    words, lengths = [], []
    for i in range(20):
        tokens, segments = expected_record([Message("user", f"{i}?"), Message("assistant", "y" * i)])
        if i:  # the first has no answer
            length = sum(part != 0 for part in segments)
            starts = [0, segments.index(2)]
            words += [token | (1 << 15 if n in starts else 0) for n, token in enumerate(tokens[:length])]
            lengths.append(length)
    content = np.array(words, "<u2").tobytes() + np.array(lengths, "<i8").tobytes()
    assert metadata.splits["train"].sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.slow
def test_equal_records_for_any_workers_and_shards(tmp_path, monkeypatch):
    cut(monkeypatch, 300)
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 200)
    records = [{"messages": turns(TWO_TURNS[: 2 + 2 * (i % 2)] + [Message("user", str(i))])} for i in range(60)]
    records += [{"prompt": f"{i}?", "response": "y" * i} for i in range(40)]
    source = write_dialogues(tmp_path / "d.jsonl", records)
    datasets = [prepare_dialogues(source, tmp_path / "1", validation_fraction=0.3)]
    monkeypatch.setattr(stream, "SHARD_TOKENS", 2000)
    datasets.append(prepare_dialogues(source, tmp_path / "2", workers=2, validation_fraction=0.3))
    assert len(datasets[1].splits["train"].shards) > 1 and datasets[0].sha256 == datasets[1].sha256
    for split, name in itertools.product(("train", "validation"), ("tokens", "segment_ids")):
        np.testing.assert_array_equal(rows(tmp_path / "1", split)[name], rows(tmp_path / "2", split)[name])


def test_equal_dialogues_fall_into_one_split(tmp_path):
    records = [{"prompt": f"{i % 20}?", "response": "!"} for i in range(60)]
    prepare_dialogues(write_dialogues(tmp_path / "d.jsonl", records), tmp_path / "out", validation_fraction=0.3)
    train, held_out = (
        {tuple(row) for row in rows(tmp_path / "out", split)["tokens"]} for split in ("train", "validation")
    )
    assert train and held_out and not train & held_out


def test_a_tokenizer_is_trained_on_the_messages(tmp_path):
    records = [{"messages": turns([Message("user", "zebra " * 9), Message("assistant", "quagga " * 9)])}] * 20
    prepare_dialogues(
        write_dialogues(tmp_path / "d.jsonl", records), tmp_path / "out", tokenizer="sentencepiece", vocab_size=275
    )
    tokenizer = pipeline.open_dataset(tmp_path / "out").tokenizer
    assert len(tokenizer.encode(" zebra")) == len(tokenizer.encode(" quagga")) == 3
    assert len(tokenizer.encode("content")) > 5  # of the JSON around them, nothing


# --- one turn of a dialogue


def three_turns():
    messages = [Message(role, f"{role[0]}{i}") for i in range(3) for role in ("user", "assistant")]
    tokens, segments = expected_record(messages, length=120)
    return {"tokens": np.array([tokens], np.int32), "segment_ids": np.array([segments], np.int32)}, messages


@pytest.mark.parametrize("draw", range(5))
def test_a_turn_is_the_record_of_the_shorter_dialogue(draw):
    dialogue, messages = three_turns()
    turn = sft.select_turn(dialogue, [draw], EOS)
    k = draw % 3 + 1
    tokens, segments = expected_record(messages[: 2 * k], length=120)
    assert turn["tokens"][0].tolist() == tokens
    answer = [2 if part == 2 * k else 1 if part else 0 for part in segments]
    assert turn["segment_ids"][0].tolist() == answer
    assert {values.dtype for values in turn.values()} == {np.dtype(np.int32)}


def dialogues(tmp_path):
    """Return dialogues of one, two and three turns; the first token of a question says which dialogue it is."""
    records = []
    for i in range(24):
        asked = [Message("user", f"{chr(65 + i)}?"), Message("assistant", "1")]
        later = [[Message("user", "?"), Message("assistant", str(n))] for n in (2, 3)]
        records.append({"messages": turns(sum(later[: i % 3], asked))})
    source = write_dialogues(tmp_path / "d.jsonl", records)
    settings = {"sequence_length": 120, "validation": str(source), "validation_fraction": None}
    prepare_dialogues(source, tmp_path / "out", **settings)
    return pipeline.open_dataset(tmp_path / "out")


def chosen(batch):
    """Dialogue and the number of its answer, of each row."""
    number = [int(chr(row[parts == 2][0])) for row, parts in zip(batch["tokens"], batch["segment_ids"], strict=True)]
    letter = [row[len("### user\n") + 1] - 65 for row in batch["tokens"]]
    return list(zip(letter, number, strict=True))


def test_a_dialogue_comes_once_an_epoch_with_any_of_its_answers(tmp_path):
    dataset = dialogues(tmp_path)

    def drawn(count, **settings):
        batches = pipeline.train_batches(dataset, **{"batch_size": 8, "seed": 0, **settings})
        return [chosen(batch) for batch in itertools.islice(batches, count)]

    whole = drawn(90)
    epochs = [sum(whole[3 * e : 3 * e + 3], []) for e in range(30)]
    counts = np.zeros((24, 4))
    for epoch in epochs:
        assert sorted(i for i, _ in epoch) == list(range(24))
        for i, number in epoch:
            counts[i, number] += 1
    for turns_there in range(3):
        share = counts[turns_there::3].sum(0)[1 : turns_there + 2] / counts[turns_there::3].sum()
        np.testing.assert_allclose(share, 1 / (turns_there + 1), atol=0.12)  # 240 draws: 3.7 standard errors
        assert not counts[turns_there::3, turns_there + 2 :].any()
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 25
    # A function of (seed, k) alone, also for a host that reads some of the rows.
    assert drawn(2, start=40) == whole[40:42]
    assert drawn(1, start=40, rows=[5, 2])[0] == [whole[40][5], whole[40][2]]
    assert drawn(3, seed=1) != whole[:3]


def test_evaluation_always_takes_the_same_answer_of_a_dialogue(tmp_path):
    dataset = dialogues(tmp_path)
    first, again = ([chosen(batch) for batch in pipeline.eval_batches(dataset, batch_size=8)] for _ in range(2))
    assert first == again
    other = sum([chosen(batch) for batch in pipeline.eval_batches(dataset, batch_size=6)], [])
    assert other == sum(first, [])
    assert {number for i, number in other if i % 3 == 2} == {1, 2, 3}


def test_draws_never_change():
    """Runs of earlier versions go on with the same answers."""
    assert [sft.draw(0, 0, np.int64(i)) for i in range(3)] == [1421166345, 1796504695, 1124654637]
    assert sft.draw("validation", 7) == 4167884631


def test_templates_of_a_dataset_are_those_of_its_tokenizer(tmp_path):
    metadata = prepare_dialogues(
        write_dialogues(tmp_path / "d.jsonl", [{"prompt": "2+2?", "response": "4"}]), tmp_path / "out"
    )
    assert templates.Template.from_dict(metadata.template) == templates.choose("plain", BYTE)


@pytest.mark.parametrize(
    "name",
    [
        "gsm8k/test.jsonl",
        "chat/fastchat/dummy_conversation.json",
        "chat/gpteacher/codegen-instruct.json",
        "chat/dolly_hhrlhf/dolly_hhrlhf_train_small.jsonl",
    ],
)
def test_real_instruction_data(name, data_dir, tmp_path):
    source = Path(data_dir) / name
    metadata = prepare_dialogues(source, tmp_path / "out", sequence_length=1024)
    there = source.read_text()
    count = len(json.loads(there) if name.endswith(".json") else there.splitlines())
    split = metadata.splits["train"]
    assert metadata.malformed == 0 and split.raw_bytes == split.token_bytes
    if "dummy" in name:
        assert (split.records, split.documents) == (count, 2 * count)
    else:
        assert split.records + metadata.too_long + metadata.empty == count
