"""Training documents that share words with evaluation files are left out and listed, and no others."""

import json
import random
import re

import pytest
from support.datasets import prepare, write_jsonl

from diffusionlm.errors import UserError

WORDS = [f"w{i}" for i in range(12)]


def grams(text, n):
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.fixture
def corpus(tmp_path):
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(200)]
    return texts, str(write_jsonl(tmp_path / "texts.jsonl", texts))


@pytest.fixture
def evaluation(tmp_path):
    draw = random.Random(2)
    file = tmp_path / "evaluation.jsonl"
    questions = [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(20)]
    lines = [{"id": i, "question": text, "more": {"answers": [text[::-1], "yes"]}} for i, text in enumerate(questions)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return questions, str(file)


@pytest.mark.parametrize("n", [3, 4])
def test_documents_with_a_run_of_an_evaluation_text_are_left_out(n, corpus, evaluation, tmp_path):
    texts, source = corpus
    questions, file = evaluation
    forbidden = set().union(*(grams(text, n) | grams(text[::-1], n) for text in questions))
    expected = [i for i, text in enumerate(texts) if grams(text, n) & forbidden]
    assert 5 < len(expected) < 180
    metadata = prepare(source, tmp_path / "out", decontaminate=[file], contamination_words=n)
    assert metadata.left_out == {"decontaminate": len(expected)}
    assert metadata.splits["train"].documents == len(texts) - len(expected)
    listed = [json.loads(line) for line in (tmp_path / "out" / "contaminated.jsonl").read_text().splitlines()]
    assert [entry["location"] for entry in listed] == [f"{source}:{i + 1}" for i in expected]
    for i, entry in zip(expected, listed, strict=True):
        number = int(entry["evaluation"].rpartition(":")[2]) - 1
        assert entry["words"] in grams(texts[i], n)
        assert entry["words"] in grams(questions[number], n) | grams(questions[number][::-1], n)


def test_case_and_punctuation_do_not_matter_and_words_do(tmp_path):
    source = write_jsonl(
        tmp_path / "texts.jsonl", ["Well: THE quick, brown fox!", "the quick red fox", "other text here"]
    )
    (tmp_path / "evaluation.txt").write_text("So the quick (brown) fox ran.")
    metadata = prepare(
        str(source), tmp_path / "out", decontaminate=[str(tmp_path / "evaluation.txt")], contamination_words=4
    )
    assert metadata.left_out == {"decontaminate": 1} and metadata.splits["train"].documents == 2


def test_texts_are_composed_and_scripts_without_spaces_are_compared_by_character(tmp_path):
    texts = [
        "un cafe\u0301 tre\u0300s chaud et noir",
        "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u554a",
        "\u4eca\u5929\u4e0d\u597d",
        "a text of another kind",
    ]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    (tmp_path / "a.txt").write_text("Un caf\u00e9 tr\u00e8s chaud!", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\u5929\u5929\u6c14\u5f88", encoding="utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    metadata = prepare(str(source), tmp_path / "out", decontaminate=files, contamination_words=4)
    assert metadata.left_out == {"decontaminate": 2}


def test_held_out_documents_are_not_looked_at(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", ["a training text without it", "one two three four"])
    held_out = write_jsonl(tmp_path / "valid.jsonl", ["one two three four and more of the same"])
    settings = {"validation": str(held_out), "validation_fraction": None}
    metadata = prepare(str(train), tmp_path / "out", decontaminate=[str(held_out)], contamination_words=4, **settings)
    assert metadata.splits["validation"].documents == 1 and metadata.left_out == {"decontaminate": 1}


def test_the_evaluation_files_are_part_of_the_request(corpus, evaluation, tmp_path):
    _, source = corpus
    _, file = evaluation
    options = {"decontaminate": [file], "contamination_words": 4}
    made = prepare(source, tmp_path / "out", **options)
    assert prepare(source, tmp_path / "out", **options) == made
    with open(file, "a") as opened:
        opened.write('{"question": "w1 w1 w1 w1"}\n')
    with pytest.raises(UserError, match="holds another dataset"):
        prepare(source, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contamination_words": 5}, "contamination_words=5 is for decontaminate"),
        ({"decontaminate": "evaluation.jsonl"}, "must be a list of files"),
        ({"decontaminate": ["{tmp}/none.jsonl"]}, "none.jsonl"),
        ({"decontaminate": ["{file}"], "contamination_words": 1}, "contamination_words=1"),
        ({"decontaminate": ["{file}"], "contamination_words": 400}, "has 400 words"),
        ({"decontaminate": ["{file}"], "format": "sft"}, "decontaminate is for format=text"),
    ],
)
def test_a_mistake_is_one_line(options, message, corpus, evaluation, tmp_path):
    places = {"tmp": tmp_path, "file": evaluation[1]}
    if isinstance(files := options.get("decontaminate"), list):
        options = options | {"decontaminate": [file.format(**places) for file in files]}
    with pytest.raises(UserError, match=message) as caught:
        prepare(corpus[1], tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
