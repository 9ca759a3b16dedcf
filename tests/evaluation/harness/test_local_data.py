"""Every published form of a record gives the prompt of the harness' own task; a wrong file is one line."""

import json

import pytest
from support.tiny_tasks import HUMANEVAL, MBPP, write

from diffusionlm.errors import UserError
from diffusionlm.evaluation.harness import TASKS, local_data
from diffusionlm.evaluation.harness.local_data import LOCAL, read

OPTIONS = [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]
COLUMNS = {"text": ["x", "y"], "label": ["A", "B"]}
ARC = {"query": "Question: Why?\nAnswer:", "choices": ["x", "y"], "gold": 1}
BOOLQ = {"query": "Sky.\nQuestion: is it?\nAnswer:", "choices": ["no", "yes"], "gold": 1}
WINO = {"contexts": ["Al saw Al", "Al saw Bo"], "continuation": "run.", "gold": 1}
LETTERS = {"query": "Question: Why?\nA. x\nB. y\nAnswer:", "choices": ["A", "B"], "gold": 1}

FORMS = [
    (
        "hellaswag",
        {"activity_label": "Cut", "ctx_a": "He [x] is.", "ctx_b": "he", "endings": ["a [title] b", "c"], "label": "1"},
        {"query": "Cut: He is. He", "choices": ["a. b", "c"], "gold": 1},
    ),
    ("piqa", {"goal": "g", "sol1": "x", "sol2": "y", "label": 1}, ARC | {"query": "Question: g\nAnswer:"}),
    ("arc_easy", {"query": "Question: Why?", "choices": ["x", "y"], "gold": 1}, ARC),
    ("arc_easy", {"id": "7", "question": {"stem": "Why?", "choices": OPTIONS}, "answerKey": "B"}, ARC),
    ("arc_challenge", {"question": "Why?", "choices": COLUMNS, "answerKey": "B"}, ARC),
    ("openbookqa", {"question_stem": "Why", "choices": COLUMNS, "answerKey": "B "}, ARC | {"query": "Why"}),
    ("openbookqa", {"question": {"stem": "Why", "choices": OPTIONS}, "answerKey": "B"}, ARC | {"query": "Why"}),
    ("commonsense_qa", {"question": {"stem": "Why?", "choices": OPTIONS}, "answerKey": "B"}, LETTERS),
    ("commonsense_qa", {"query": LETTERS["query"], "choices": ["A", "B"], "gold": 1}, LETTERS),
    ("boolq", {"query": "Passage: Sky.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}, BOOLQ),
    ("boolq", {"question": "is it", "passage": "Sky.", "answer": True, "title": "t"}, BOOLQ),
    ("boolq", {"question": "is it", "passage": "Sky.", "label": 1}, BOOLQ),
    ("winogrande", {"context_options": WINO["contexts"], "continuation": "run.", "gold": 1}, WINO),
    ("winogrande", {"sentence": "Al saw _ run.", "option1": "Al", "option2": "Bo", "answer": "2"}, WINO),
    (
        "social_iqa",
        {"context": "Al ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        {"query": "Q: Al ran. Why?\nA:", "choices": ["a", "b", "c"], "gold": 2},
    ),
    (
        "race",
        {
            "article": "T.",
            "questions": ["Who?", "He  _  .", "Why?"],
            "options": [["a", "b"], ["ran", "sat"], ["x", "y"]],
            "answers": ["A", "B", "B"],
        },
        ARC | {"query": "Article: T.\n\nQuestion: Who?\nAnswer: a\nHe sat\nWhy?"},
    ),
    (
        "lambada_openai",
        {"context": "It is one o", "continuation": "clock"},
        {"context": "It is one o", "word": " clock"},
    ),
    ("lambada_standard", {"text": "it is one"}, {"context": "it is", "word": " one"}),
    ("gsm8k", {"question": "1+1?", "answer": "#### 2"}, {"question": "1+1?", "answer": "#### 2"}),
    ("humaneval", HUMANEVAL[1] | {"further": 1}, HUMANEVAL[1]),
    ("mbpp", MBPP[0], {name: value for name, value in MBPP[0].items() if name != "challenge_test_list"}),
]


@pytest.mark.parametrize("task, record, doc", FORMS, ids=[f"{i}-{task}" for i, (task, *_) in enumerate(FORMS)])
def test_a_record_gives_the_prompt_of_the_harness(task, record, doc):
    assert LOCAL[task].read(record, "here") == doc


@pytest.mark.parametrize(
    "task, record, message",
    [
        ("hellaswag", {"ctx": "a"}, "here: a record with the fields ctx; known are query choices gold, or activity_"),
        ("hellaswag", {"query": "a", "choices": ["b", "c"], "gold": 2}, "the right answer 2 is none of 2 choices"),
        ("piqa", {"goal": "g", "sol1": "x", "sol2": "y"}, "here: a record with the fields goal sol1 sol2"),
        ("piqa", {"goal": "g", "sol1": "x", "sol2": "y", "label": "z"}, "the right answer 'z' is no number"),
        ("arc_easy", {"question": "Why?", "choices": COLUMNS, "answerKey": "C"}, "answer 'C' is none of A B"),
        ("winogrande", {"sentence": "Al", "option1": "a", "option2": "b", "answer": "1"}, "has no blank _"),
        ("lambada_standard", {"text": "one"}, "a passage without words before its last one"),
        ("gsm8k", {"question": "1", "answer": "2"}, "has no ####"),
        ("boolq", {"query": 3, "choices": [], "gold": 0}, "here"),
        ("mbpp", {"text": "t", "code": "x"}, "here: a record with the fields code text; known are task_id text code"),
        ("mbpp", MBPP[0] | {"code": "def plus(a)"}, "here: the code or the tests are no program: expected ':'"),
        ("mbpp", MBPP[0] | {"test_list": ["assert 1 +"]}, "here: the code or the tests are no program"),
        ("mbpp", MBPP[0] | {"test_list": ["assert minus(1)"]}, "here: the tests use nothing that the code defines"),
    ],
)
def test_a_wrong_record_is_one_line(task, record, message):
    with pytest.raises(UserError, match=message) as caught:
        LOCAL[task].read(record, "here")
    assert "\n" not in str(caught.value)


def test_files_are_found_and_labels_joined(tmp_path):
    directory = write(tmp_path)
    docs = read("piqa", directory)["test"]
    assert [doc["gold"] for doc in docs] == [0, 1, 0, 1, 0] and docs[2]["query"] == "Question: goal 2\nAnswer:"
    assert set(read("gsm8k", directory)) == {"train", "test"}
    (tmp_path / "eval/lambada/lambada_test_plain_text.txt").write_text("a b c\n\nd e\n")
    assert [doc["word"] for doc in read("lambada_standard", directory)["test"]] == [" c", " e"]


def test_the_splits_of_mbpp_are_those_of_its_authors(tmp_path):
    """One file has them all: 2 to 4 are the examples of the prompt, 11 to 510 is the test set (Austin et al., 2021)."""
    splits = read("mbpp", write(tmp_path))
    assert {split: [doc["task_id"] for doc in docs] for split, docs in splits.items()} == {
        "prompts": [2, 3, 4],
        "test": [11, 510],
    }
    (tmp_path / "eval/mbpp/mbpp.jsonl").write_text(json.dumps(MBPP[1]) + "\n")
    with pytest.raises(UserError, match="mbpp.jsonl holds no records with a task_id from 11 to 510"):
        read("mbpp", str(tmp_path))


def test_the_environment_names_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv(local_data.DIRECTORY, write(tmp_path))
    assert len(read("boolq")["test"]) == 3
    monkeypatch.delenv(local_data.DIRECTORY)
    with pytest.raises(UserError, match="boolq_local needs the directory of its files: --data DIR"):
        read("boolq")


def test_missing_and_damaged_files_are_one_line(tmp_path):
    directory = write(tmp_path)
    with pytest.raises(UserError, match=r"race_local finds no file in .*; it reads eval/race/test_high.jsonl or"):
        read("race", directory)
    path = tmp_path / "eval/piqa/valid.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"goal": "g", "sol1": "x", "sol2": "y"}) + "\n")
    with pytest.raises(UserError, match=r"valid.jsonl.*6: no right answer, as .*valid-labels.lst ends before it"):
        read("piqa", directory)
    path.write_text('{"goal": "g"\n')
    with pytest.raises(UserError, match=r"valid.jsonl.*1: invalid JSON"):
        read("piqa", directory)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no records"):
        read("piqa", directory)


def test_every_task_has_its_file():
    assert {path.stem for path in TASKS.glob("*.yaml")} == {f"{task}_local" for task in LOCAL}


@pytest.mark.parametrize(
    "task, documents",
    [
        ("hellaswag", 10042),
        ("piqa", 1838),
        ("arc_easy", 2376),
        ("arc_challenge", 1172),
        ("boolq", 3270),
        ("winogrande", 1267),
        ("commonsense_qa", 1221),
        ("lambada_openai", 5153),
        ("lambada_standard", 5153),
        ("gsm8k", 1319),
        ("humaneval", 164),
    ],
)
def test_the_real_files_are_read_whole(task, documents, data_dir):
    assert len(read(task, data_dir)["test"]) == documents
