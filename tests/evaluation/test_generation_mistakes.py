"""Tasks in which a model writes: options, files and models that do not suit them give one line."""

import dataclasses
import gzip

import pytest
from support.command_line import assert_one_line
from support.slow_cases import thinned

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers
from diffusionlm.evaluation.answers import Prompt


@pytest.mark.parametrize(("tokens", "fix"), [(95, "use --length 1 or less"), (96, "no prompt fits with any length")])
def test_the_length_that_fits_is_named(tokens, fix, places):
    """The context has 96 tokens; the shortest prompt leaves the most of them."""
    prompts = [Prompt([0] * 200, "", 0), Prompt([0] * tokens, "", 1)]
    with pytest.raises(UserError, match=f"of {tokens} tokens, exceeds the model's context of 96; {fix}"):
        answers.fitting(dlm.load(places["mdm"]), prompts, 5)


MISTAKES = [
    ("gsm8k --data {tmp}/none.jsonl", ["{tmp}/none.jsonl'; check the path"]),
    (
        "gsm8k --data {facts_jsonl}",
        ["facts.jsonl:1: no field 'question' among 'prompt', 'completion'", "reads 'question' and 'answer'"],
    ),
    ("gsm8k --data {passages_txt}", ["passages.txt", "a text", ".jsonl"]),
    ("gsm8k --data {problems_jsonl}", ["length=256", "context of 96; use --length 69 or less"]),
    ("gsm8k --data {problems_jsonl} --length 8 --shots 2", ["shots=2 needs shots_data"]),
    ("gsm8k --data {problems_jsonl} --length 8 --shots 2 --shots_data {problems_jsonl}", ["the questions themselves"]),
    ("gsm8k --data {problems_jsonl} --length 8 --shots 2 --shots_data {tmp}/./prob*.jsonl", ["questions themselves"]),
    ("gsm8k --data {problems_jsonl} --length 8 --batch_size 0", ["batch_size=0"]),
    (
        "reverse_curse --data {facts_jsonl} --reverse {problems_jsonl}",
        ["problems.jsonl:1: no field 'prompt' among 'question', 'answer'"],
    ),
    ("poems --data {facts_jsonl}", ["facts.jsonl:1: no field 'first' among", "reads 'first' and 'second'"]),
    ("lambada --data {facts_jsonl}", ["facts.jsonl:1: no field 'text' among 'prompt'", "'context' and 'continuation'"]),
    ("lambada --data {passages_jsonl} --length 3", ["length=3 has no effect in lambada", "leave it out"]),
    ("temporal_shift --data {facts_jsonl}", ["facts.jsonl:1: no field 'text' among 'prompt'", "--field NAME"]),
    ("temporal_shift --data {years_jsonl} --by decade", ["years.jsonl:1: no field 'decade' among 'text'", "--by NAME"]),
    ("temporal_shift --data {years_jsonl} --by text --width 5", ["'abc' is no integer", "leave out --width"]),
    ("temporal_shift --data {years_jsonl} --width 0", ["width=0"]),
    ("human_eval --data {problems_jsonl}", ["problems.jsonl:1: no field 'task_id'"]),
    ("human_eval_infilling --data {functions_jsonl} --length 3", ["length=3 has no effect in human_eval_infilling"]),
    ("human_eval_infilling --data {facts_jsonl}", ["facts.jsonl:1: no field 'task_id'"]),
    ("mt_bench --data {questions_jsonl} --answers_file {tmp}/a.jsonl", ["no chat template", "--raw"]),
    ("mt_bench --data {questions_jsonl}", ["missing --answers_file"]),
    (
        "mt_bench --data {questions_jsonl} --answers_file {tmp}/a.jsonl --raw",  # the shortest turn is "Hi.", with EOS
        ["length=512", "of 6 tokens", "use --length 90 or less"],
    ),
    ("mt_bench --data {facts_jsonl} --answers_file {tmp}/a.jsonl --raw", ["facts.jsonl:1: no field 'question_id'"]),
    ("generative --scorer {mdm}", ["masked diffusion model; give an autoregressive"]),
    ("generative --scorer {tmp}/none", ["{tmp}/none", "does not exist"]),
    ("generative --scorer {arm} --samples 2000", ["samples=2000"]),
]


@pytest.mark.parametrize(("command", "parts"), thinned(MISTAKES, every=2))
def test_mistakes_are_one_line(command, parts, places, capsys):
    words = [word.format(**places) for word in command.split()]
    assert cli.main(["evaluate", places["mdm"], *words]) == 2
    assert_one_line(capsys.readouterr(), [part.format(**places) for part in parts])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"question": 1, "answer": "x"}', "question=1"),
        ('{"question": "a", "answer": "#### 1"', "invalid JSON"),
        ('["a"]', "a JSON list"),
        ('{"question": "a", "question": "b", "answer": "c"}', "comes twice"),
        ('{"question": "a\\ud800", "answer": "#### 1"}', "half a surrogate pair"),
        ('{"question": "a", "answer": "no number"}', "without '#### N'"),
        ("\n\n", "holds no record"),
        ('{"question": "' + "x" * (9 << 20) + '", "answer": "#### 1"}', "more than the 8,388,608"),
    ],
)
def test_malformed_records_are_one_line(content, part, places, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(content)
    assert cli.main(["evaluate", places["mdm"], "gsm8k", "--data", str(tmp_path / "bad.jsonl"), "--length", "8"]) == 2
    assert_one_line(capsys.readouterr(), [part])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (gzip.compress(bytes(140 << 20), 1), "unpacks to more than 200 times"),
        (gzip.compress(b'{"a": 1}\n' * 99)[:-20], "damaged gzip"),
        (b"no gzip", "damaged gzip"),
    ],
    ids=["bomb", "cut", "other"],
)
def test_packed_files_that_are_not_what_they_say(content, part, places, tmp_path, capsys):
    (tmp_path / "bad.jsonl.gz").write_bytes(content)
    words = ["evaluate", places["mdm"], "human_eval", "--data", str(tmp_path / "bad.jsonl.gz")]
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and (part in captured.err or "'task_id'" in captured.err)


def test_a_model_without_tokenizer_is_one_line(places, tmp_path):
    model = dataclasses.replace(dlm.load(places["mdm"]), tokenizer=None)
    options = {
        "gsm8k": {"data": places["problems_jsonl"]},
        "reverse_curse": {"data": places["facts_jsonl"]},
        "poems": {"data": places["couplets_json"]},
        "lambada": {"data": places["passages_jsonl"]},
        "temporal_shift": {"data": places["years_jsonl"]},
        "human_eval": {"data": places["functions_jsonl"]},
        "human_eval_infilling": {"data": places["functions_jsonl"]},
        "mt_bench": {"data": places["questions_jsonl"], "answers_file": str(tmp_path / "a"), "raw": True},
        "generative": {"scorer": places["arm"]},
    }
    for task, chosen in options.items():
        with pytest.raises(UserError, match="no tokenizer; import it again"):
            dlm.evaluate(model, task, **chosen)
