"""Programs that a model wrote: what of an answer is the program, how it is judged, and what is refused."""

from pathlib import Path

import pytest
from support.written_answers import (
    FUNCTION,
    answers_as_written,
    gaps_as_written,
    make_places,
    text_of,
    values,
)

import diffusionlm as dlm
from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers, code, records
from diffusionlm.evaluation import sandbox as sandboxes
from diffusionlm.evaluation.sandbox import run
from diffusionlm.sampling.config import SamplingConfig


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("code"))


@pytest.fixture(scope="module")
def place():
    return sandboxes.find(allow_code_execution=True)


@pytest.mark.parametrize(
    ("solution", "passed", "error"),
    [
        ("    return a + b\n", True, ""),
        ("    print('x' * 9)\n    return a + b\n", True, ""),
        ("    return a - b\n", False, "AssertionError"),
        ("    return a +\n", False, "SyntaxError"),
        ("    raise SystemExit\n", False, ""),  # the tests were never reached
        ("    import os; os._exit(0)\n", False, ""),
        ("    return a + b\nimport atexit, os\natexit.register(os._exit, 1)\n", False, ""),
    ],
)
def test_a_program_passes_if_its_tests_do(solution, passed, error, place):
    problem = code.Problem(**{name: FUNCTION[name] for name in ("task_id", "prompt", "entry_point", "test")})
    record = code.judge(place, problem, problem.prompt + solution)
    assert record["pass_at_1"] == passed and record["error"].startswith(error) and record["ending"] == "exit"


def test_human_eval_counts_what_passes(places, monkeypatch):
    texts = ["    return a + b\n\n\ndef other():\n    syntax error", "    return a\n"]
    seen = answers_as_written(monkeypatch, lambda r: texts[r])
    options = {"data": places["functions_jsonl"], "allow_code_execution": True, "sampling": SamplingConfig(length=64)}
    result = dlm.evaluate(places["mdm"], "human_eval", **options)
    assert [text_of(seen[i]) for i in range(2)] == [FUNCTION["prompt"]] * 2
    assert values(result) == {"pass_at_1": 0.5, "out_of_time": 0, "problems": 2, "too_long": 0}
    assert result.metrics["pass_at_1"].stderr == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("Sure:\n```python\ndef add(a, b):\n    return 1\n```\nDone.", "import re\ndef add(a, b):\n    return 1\n"),
        ("```\n    return 1\n```", "import re\ndef add(a, b):\n    return 1\n"),
        ("    return 1\n", "import re\ndef add(a, b):\n    return 1\n"),
        ("```py\ndef add(a, b):\n    return 1", "import re\ndef add(a, b):\n    return 1"),
    ],
)
def test_the_program_in_an_answer(answer, program):
    problem = code.Problem(task_id="", prompt="import re\ndef add(a, b):\n", entry_point="add", test="")
    assert code._code_of(problem, answer) == program


def test_infilling_of_code(places, monkeypatch):
    gold = FUNCTION["canonical_solution"]
    seen = gaps_as_written(monkeypatch, lambda r: [gold, gold.replace("+", "-")][r])
    options = {"data": places["functions_jsonl"], "allow_code_execution": True, "examples": 1}
    result = dlm.evaluate(places["mdm"], "human_eval_infilling", **options)
    for template in seen.values():
        assert template.count(None) == len(gold)
        assert (
            bytes(token for token in template[1:] if token is not None).decode()
            == FUNCTION["prompt"] + FUNCTION["suffix"]
        )
    expected = {"pass_at_1": 0.5, "exact_match": 0.5, "out_of_time": 0, "gaps": 2, "too_long": 0}
    assert values(result) == expected
    one_sided = gaps_as_written(monkeypatch, lambda r: gold)
    dlm.evaluate(places["arm"], "human_eval_infilling", **options)
    assert bytes(token for token in one_sided[0][1:] if token is not None).decode() == FUNCTION["prompt"]


def test_the_solutions_of_human_eval_pass(data_dir, place):
    path = Path(data_dir) / "eval" / "humaneval" / "HumanEval.jsonl.gz"

    class Solved(code.Problem, frozen=True):
        canonical_solution: str

    for problem in records.read_records(str(path), Solved, 4):
        assert code.judge(place, problem, problem.prompt + problem.canonical_solution)["pass_at_1"]
        assert not code.judge(place, problem, problem.prompt + "    return 'no'\n")["pass_at_1"]


@pytest.mark.slow
def test_all_solutions_of_the_infilling_files_pass(data_dir, place):
    for path in sorted((Path(data_dir) / "eval" / "humaneval_infilling").iterdir()):
        for gap in records.read_records(str(path), code.Gap, None)[::50]:
            program = gap.prompt + gap.canonical_solution + gap.suffix
            assert code.judge(place, gap, program)["pass_at_1"], gap.task_id


def test_code_is_refused_before_it_is_written_where_no_sandbox_works(places, monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda place: "no")
    monkeypatch.setattr(answers, "generate", None)
    with pytest.raises(UserError, match="runs only in a sandbox"):
        dlm.evaluate(places["mdm"], "human_eval", data=places["functions_jsonl"], sampling=SamplingConfig(length=8))
