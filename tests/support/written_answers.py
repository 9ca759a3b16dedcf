"""Make models and files for the tasks in which a model writes, and put texts in the place of what it writes."""

import json

import jax.numpy as jnp
import numpy as np

from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.evaluation import answers, gaps
from diffusionlm.sampling.generate import GenerationResult, Infilling
from support.random_params import make_params
from support.tiny_checkpoint import MODEL, save

EOS = ByteTokenizer.eos_id
PROBLEMS = [
    {"question": "One and two?", "answer": "1+2=3\n#### 3"},
    {"question": "A thousand?", "answer": "It is 1,000\n#### 1,000"},
    {"question": "Nothing?", "answer": "#### 0"},
]
FUNCTION = {
    "task_id": "T/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
    "canonical_solution": "    return a + b\n",
    "suffix": "\nx = 1\n",
    "further": ["fields", "are", "left", "alone"],
}
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Hi.", "Go on."]},
    {"question_id": 82, "category": "math", "turns": ["1+1?", "2+2?"]},
]
YEARS = [
    {"text": text, "year": year} for text, year in (("abc", 1805), ("defgh", 1849), ("ij", 1851), ("k" * 90, 1899))
]


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def make_places(directory):
    """Return checkpoints and files by name; `uniform` gives every token the same probability."""
    flat = {"head": jnp.zeros_like(make_params(MODEL)["head"])}
    checkpoints = {
        "mdm": save(directory / "mdm"),
        "arm": save(directory / "arm", "arm"),
        "uniform": save(directory / "uniform", "arm", **flat),
        "tmp": str(directory),
    }
    files = {
        "problems.jsonl": lines(PROBLEMS),
        "facts.jsonl": lines(
            [{"prompt": "He is", "completion": " Al Bo"}, {"prompt": "She is", "completion": " Cy Di"}]
        ),
        "reverse.jsonl": lines([{"prompt": "Al is", "completion": " he"}, {"prompt": "Cy is", "completion": " she"}]),
        "couplets.json": json.dumps([{"first": "ab", "second": "cd"}, {"first": "ef", "second": "gh"}]),
        "passages.jsonl": lines([{"context": "he saw the", "continuation": "cat"}, {"text": "she ate all  fish "}]),
        "passages.txt": "he saw the cat\n\nshe ate all  fish\n",
        "functions.jsonl": lines([FUNCTION, FUNCTION | {"task_id": "T/1"}]),
        "questions.jsonl": lines(QUESTIONS),
        "years.jsonl": lines(YEARS),
    }
    for name, content in files.items():
        (directory / name).write_text(content)
    return checkpoints | {name.replace(".", "_"): str(directory / name) for name in files}


def answers_as_written(monkeypatch, writes):
    """Every prompt is answered by `writes`, a function of its number; returns the prompts that were seen."""
    seen = {}

    def generate(params, cfg, prompts, sampling, *, row_ids):
        tokens = []
        for ids, r in zip(prompts, row_ids, strict=True):
            assert seen.setdefault(r, ids) == ids
            text = [*writes(r).encode()]
            assert len(text) <= sampling.length
            tokens.append(text + [EOS] * (sampling.length - len(text)))
        return GenerationResult(np.array(tokens), np.ones(len(prompts), int), 0.0, None)

    monkeypatch.setattr(answers, "generate", generate)
    return seen


def gaps_as_written(monkeypatch, writes):
    """Every gap is filled by `writes`, a function of the number of its row that gives as many bytes."""
    seen = {}

    def infill(params, cfg, templates, sampling, *, row_ids):
        rows = []
        for template, r in zip(templates, row_ids, strict=True):
            seen[r] = template
            new = iter(writes(r).encode())
            rows.append([next(new) if token is None else token for token in template])
        return Infilling(rows, [()] * len(rows), np.ones(len(rows)), 0.0, None)

    monkeypatch.setattr(gaps, "infill", infill)
    return seen


def values(result):
    return {name: metric.value for name, metric in result.metrics.items()}


def text_of(ids):
    assert ids[0] == EOS
    return bytes(ids[1:]).decode()
