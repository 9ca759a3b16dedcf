"""The scripts that make data for fine-tuning: what is asked can be answered, and is."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "experiments/benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROBLEM = {"question": "2+3 apples?", "answer": "First <<2+3=5>>5.\nThen <<5*2=10>>10.\n#### 10"}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            "smdm",
            [
                ("Question: 2+3 apples?\nAnswer:", " First <<2+3=5>>5.\nThen <<5*2=10>>10."),
                ("Question: 2+3 apples?\nAnswer: First <<2+3=5>>5.\nThen <<5*2=10>>10.\n", "#### 10"),
            ],
        ),
        ("diffugpt", [("Question: 2+3 apples?\nAnswer:", " <<2+3=5>> <<5*2=10>> #### 10")]),
    ],
)
def test_problems_in_the_forms_of_the_papers(form, expected, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    script("gsm8k_examples").main(tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl", form)
    lines = [json.loads(line) for line in (tmp_path / "out" / "out.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["completion"]) for line in lines] == expected


STORY = (
    "Once upon a time, there was a girl named Lily. She had a cat. Lily saw a big dog. "
    '"Hello! Who are you?" said Lily. The dog ran. Lily was happy. They played all day. Then they went home.'
)


def test_sentences_keep_quotations_together():
    found = script("story_dialogues").sentences(STORY)
    assert len(found) == 8 and found[3].count('"') == 2
    assert " ".join(found) == STORY


def test_dialogues_are_made_of_the_story():
    module = script("story_dialogues")
    sentences = module.sentences(STORY)
    kinds = set()
    for seed in range(30):
        turns = module.told(STORY, random.Random(seed))
        assert len(turns) == 3
        for _, answer in turns:
            assert answer in STORY
        assert any(word in turns[0][0] for word in ("Lily", "cat", "dog"))
        ((question, answer),) = module.asked(STORY, random.Random(seed))
        kinds.add(question.rpartition(". ")[2].rpartition("! ")[2])
        assert answer == "The story is about Lily." or (answer in sentences and answer in question)
    assert kinds >= {"Who is the story about?", "What did Lily see?", "How did Lily feel?"}


def test_equal_seeds_give_equal_dialogues():
    module = script("story_dialogues")
    first, again, other = (list(module.dialogues([STORY] * 20, seed)) for seed in (0, 0, 1))
    assert first == again != other
