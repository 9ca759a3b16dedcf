"""Programs that a model wrote: what of an answer is the program, what is counted, and what is refused."""

import pytest
from support.slow_cases import slow_but
from support.written_answers import FUNCTION, answers_as_written, gaps_as_written, text_of, values

import diffusionlm as dlm
from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers, code
from diffusionlm.evaluation.sandbox import run
from diffusionlm.sampling.config import SamplingConfig


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


@pytest.mark.slow
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


@pytest.mark.parametrize("task", slow_but(["human_eval", "human_eval_infilling"], ("human_eval",)))
def test_what_was_late_is_judged_again(task, places, tmp_path, monkeypatch):
    """It says how busy the machine was, so that a resumed evaluation judges the answer that it has once more."""
    gold, judged, endings = FUNCTION["canonical_solution"], [], {"T/0": "exit", "T/1": "late"}

    def judge(place, trial, solution):
        judged.append(ending := [*endings.values()][len(judged)])
        return {"pass_at_1": ending == "exit", "ending": ending, "error": ""}

    monkeypatch.setattr(code, "judge", judge)
    answers_as_written(monkeypatch, lambda r: gold)
    gaps_as_written(monkeypatch, lambda r: gold)
    sampling = {"sampling": SamplingConfig(length=64)} if task == "human_eval" else {}
    options = {"data": places["functions_jsonl"], "output": tmp_path / "result.json", **sampling}
    first = values(dlm.evaluate(places["mdm"], task, allow_code_execution=True, **options))
    assert (first["pass_at_1"], first["out_of_time"]) == (0.5, 1) and judged == ["exit", "late"]
    judged.clear()
    monkeypatch.setattr(answers, "generate", None)  # no answer is written once more
    monkeypatch.setattr(code.fillings, "fill_middles", None)
    again = values(dlm.evaluate(places["mdm"], task, allow_code_execution=True, resume=True, **options))
    assert (again["pass_at_1"], again["out_of_time"]) == (1, 0) and judged == ["exit"]
    judged.clear()
    last = values(dlm.evaluate(places["mdm"], task, allow_code_execution=True, resume=True, **options))
    assert judged == [] and last == again


@pytest.mark.slow
def test_what_used_up_its_time_is_not_judged_again(places, tmp_path, monkeypatch):
    """Otherwise the score could only rise with every repetition."""
    judged = []

    def judge(place, trial, solution):
        judged.append(solution)
        return {"pass_at_1": False, "ending": "time", "error": ""}

    monkeypatch.setattr(code, "judge", judge)
    answers_as_written(monkeypatch, lambda r: FUNCTION["canonical_solution"])
    options = {"data": places["functions_jsonl"], "output": tmp_path / "result.json"}
    options |= {"allow_code_execution": True, "sampling": SamplingConfig(length=64)}
    first = values(dlm.evaluate(places["mdm"], "human_eval", **options))
    assert first["out_of_time"] == len(judged) == 2
    assert values(dlm.evaluate(places["mdm"], "human_eval", resume=True, **options)) == first and len(judged) == 2


def test_code_is_refused_before_it_is_written_where_no_sandbox_works(places, monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda place: "no")
    monkeypatch.setattr(answers, "generate", None)
    with pytest.raises(UserError, match="runs only in a sandbox"):
        dlm.evaluate(places["mdm"], "human_eval", data=places["functions_jsonl"], sampling=SamplingConfig(length=8))
