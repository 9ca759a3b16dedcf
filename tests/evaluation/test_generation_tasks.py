"""Tasks in which a model writes: scores of known texts, prompts, and answers that depend on nothing else."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from support.written_answers import EOS, PROBLEMS, answers_as_written, lines, text_of, values

import diffusionlm as dlm
from diffusionlm.data import chat_templates
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers, gsm8k, report
from diffusionlm.evaluation.answers import Prompt
from diffusionlm.evaluation.session import Session
from diffusionlm.sampling.config import SamplingConfig


@pytest.mark.slow
def test_gsm8k_by_all_rules(places, monkeypatch):
    texts = ["It is 3.\nQuestion: 9", "so\n#### 1000", "I do not know"]
    seen = answers_as_written(monkeypatch, lambda r: texts[r])
    settings = SamplingConfig(length=32)
    result = dlm.evaluate(places["mdm"], "gsm8k", data=places["problems_jsonl"], sampling=settings, examples=1)
    assert [text_of(seen[i]) for i in range(3)] == [f"Question: {p['question']}\nAnswer:" for p in PROBLEMS]
    third = pytest.approx(1 / 3)
    expected = {"strict_match": third, "flexible_match": pytest.approx(2 / 3), "smdm_match": third}
    assert values(result) == expected | {"problems": 3, "no_number": 1, "too_long": 0}
    assert result.metrics["strict_match"].stderr == pytest.approx(np.std([0, 1, 0], ddof=1) / math.sqrt(3))
    assert result.examples is not None and result.examples[0]["answer"] == texts[0]


@pytest.mark.slow
def test_gsm8k_with_solved_problems(places, monkeypatch, tmp_path):
    (tmp_path / "train.jsonl").write_text(lines([{"question": "One and one?", "answer": "1+1=2\n#### 2"}, PROBLEMS[0]]))
    seen = answers_as_written(monkeypatch, lambda r: "")
    options = {"data": places["problems_jsonl"], "limit": 1, "sampling": SamplingConfig(length=8)}
    dlm.evaluate(places["mdm"], "gsm8k", shots=1, shots_data=str(tmp_path / "train.jsonl"), **options)
    solved = "Question: One and one?\nAnswer: 1+1=2\n#### 2\n\n"
    assert text_of(seen[0]) == f"{solved}Question: One and two?\nAnswer:"
    with pytest.raises(UserError, match=r"train.jsonl' holds the questions themselves, such as 'One and two\?'"):
        dlm.evaluate(places["mdm"], "gsm8k", shots=2, shots_data=str(tmp_path / "train.jsonl"), **options)


@pytest.mark.slow
def test_a_chat_template_is_used_unless_it_is_raw(places, monkeypatch):
    template = chat_templates.choose("plain", ByteTokenizer())
    model = dlm.load(places["mdm"])
    monkeypatch.setattr(type(model), "template", template)
    assert answers.encode_prompt(model, "hi", raw=True) == [EOS, *b"hi"]
    assert answers.encode_prompt(model, "hi", raw=False) == model.encode_messages([{"role": "user", "content": "hi"}])


def test_a_model_trained_on_bare_prompts_is_asked_as_one_without_a_template(places, monkeypatch):
    """Its template "none" writes nothing, so a question without the words around it would be no prompt it knows."""
    monkeypatch.setattr(type(dlm.load(places["mdm"])), "template", chat_templates.choose("none", ByteTokenizer()))
    seen = answers_as_written(monkeypatch, lambda r: "")
    dlm.evaluate(places["mdm"], "gsm8k", data=places["problems_jsonl"], limit=1, sampling=SamplingConfig(length=8))
    assert text_of(seen[0]) == "Question: One and two?\nAnswer:"
    with pytest.raises(UserError, match="no chat template"):
        files = {"data": places["questions_jsonl"], "answers_file": "a.jsonl"}
        dlm.evaluate(places["mdm"], "mt_bench", **files, sampling=SamplingConfig(length=8))


def test_reverse_curse_in_both_directions(places, monkeypatch):
    texts = ["so al bo.", "he", "Al Bo", "it"]
    seen = answers_as_written(monkeypatch, lambda r: texts[r])
    files = {"data": places["facts_jsonl"], "reverse": places["reverse_jsonl"]}
    result = dlm.evaluate(places["mdm"], "reverse_curse", **files, examples=1)
    assert [text_of(seen[i]) for i in range(4)] == ["He is", "Al is", "She is", "Cy is"]
    found = values(result)
    assert (found["exact_match"], found["reverse_exact_match"]) == (0.5, 0.5)
    # "he" for "he" is whole; "it" and "she" share no character.
    assert found["reverse_bleu_characters"] == pytest.approx(0.5) == found["reverse_bleu_words"]
    assert found["bleu_words"] == 0 and (found["prompts"], found["reverse_prompts"]) == (2, 2)
    assert [example["direction"] for example in result.examples or []] == ["same", "reverse"]
    seen.clear()
    dlm.evaluate(places["mdm"], "reverse_curse", **files, limit=1)
    assert {r: text_of(ids) for r, ids in seen.items()} == {0: "He is", 1: "Al is"}  # the noise is that of all of them


def test_poems_both_ways(places, monkeypatch):
    texts = ["x cd", "zz", "gh", "ef!"]
    seen = answers_as_written(monkeypatch, lambda r: texts[r])
    result = dlm.evaluate(places["mdm"], "poems", data=places["couplets_json"], examples=1)
    ask = {way: f"\u7684{way}\u4e00\u53e5\u662f\u4ec0\u4e48\uff1f " for way in "\u4e0b\u4e0a"}
    for i, start in enumerate(["ab\u7684\u4e0b", "cd\u7684\u4e0a", "ef\u7684\u4e0b", "gh\u7684\u4e0a"]):
        assert text_of(seen[i]).startswith(start[:2] + ask[start[-1]])
    assert values(result) == {"forward": 1, "backward": 0.5, "difference": 0.5, "couplets": 2, "too_long": 0}
    assert result.metrics["difference"].stderr == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("task", "texts", "changes"),
    [
        # One couplet is right forward alone, and one backward: their differences change from 1 and -1 to 0.
        ("poems", ["cd", "zz", "zz", "ef"], {"forward": (0.5, 0.5), "backward": (0.5, 0.5), "difference": (0, 1)}),
        # The prompts of both files in turn: of the second fact both directions become right.
        (
            "reverse_curse",
            ["Al Bo", "he", "zz", "zz"],
            dict.fromkeys(("exact_match", "reverse_exact_match", "reverse_bleu_words"), (0.5, 0.5)),
        ),
    ],
)
def test_two_results_are_compared_item_by_item(task, texts, changes, places, monkeypatch, tmp_path):
    right = {"poems": ["cd", "ab", "gh", "ef"], "reverse_curse": ["Al Bo", "he", "Cy Di", "she"]}[task]
    files = {"poems": {"data": "couplets_json"}, "reverse_curse": {"data": "facts_jsonl", "reverse": "reverse_jsonl"}}
    options = {name: places[file] for name, file in files[task].items()}
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, written in zip(paths, (texts, right), strict=True):
        answers_as_written(monkeypatch, lambda r, written=written: written[r])
        dlm.evaluate(places["mdm"], task, output=path, **options)
    first, second = report.read(paths)
    for name, (value, stderr) in changes.items():
        change = report.difference(name, first, second)
        assert change == (pytest.approx(value), pytest.approx(stderr), 2), name


def test_a_model_that_writes_on_after_its_answer_is_graded_on_the_answer():
    """A model that was shown solved problems goes on with another one, after an empty line."""
    record = gsm8k._grade([Fraction(18)], ["9+9=18\n#### 18"], 0, " 9+9=18\n#### 18\n\nQuestion: How many?\n#### 3")
    assert record["strict_match"] and record["flexible_match"] and record["smdm_match"]


def test_mt_bench_writes_both_turns(places, monkeypatch, tmp_path):
    texts = ["A.", "C.", "Bee.", "Dee."]
    seen = answers_as_written(monkeypatch, lambda r: texts[r])
    path = tmp_path / "tiny.jsonl"
    options = {"data": places["questions_jsonl"], "answers_file": str(path), "sampling": SamplingConfig(length=8)}
    result = dlm.evaluate(places["mdm"], "mt_bench", raw=True, model_id="tiny", **options)
    assert text_of(seen[1]) == "Hi.\n\nA.\n\nGo on.\n\n" and text_of(seen[3]) == "1+1?\n\nBee.\n\n2+2?\n\n"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(line) for line in written] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 2
    assert [line["question_id"] for line in written] == [81, 82] and written[0]["model_id"] == "tiny"
    assert [line["choices"] for line in written] == [
        [{"index": 0, "turns": ["A.", "C."]}],
        [{"index": 0, "turns": ["Bee.", "Dee."]}],
    ]
    assert values(result) == {"questions": 2, "too_long": 0, "empty_answers": 0, "characters": 3}
    # The turns of a question are one value: 2 and 4 characters, whose mean has half their difference as its error.
    assert result.metrics["characters"].stderr == pytest.approx(1)
    with pytest.raises(UserError, match=r"tiny.jsonl' exists"):
        dlm.evaluate(places["mdm"], "mt_bench", raw=True, **options)


def test_generative_figures_of_a_uniform_scorer(places, monkeypatch):
    texts = ["a b c d e", "a b c d e", "", "f g"]
    answers_as_written(monkeypatch, lambda r: texts[r])
    options = {"scorer": places["uniform"], "samples": 4, "sampling": SamplingConfig(length=16)}
    found = dlm.evaluate(places["mdm"], "generative", examples=3, **options)
    scores = values(found)
    assert scores["nats_per_token"] == pytest.approx(math.log(257), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(257, rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-5)
    assert (scores["samples"], scores["empty_samples"], scores["tokens"]) == (4, 1, 9 + 9 + 3)
    assert scores["unigram_entropy"] == pytest.approx((2 * math.log(5) + math.log(2)) / 3)
    assert scores["distinct_1"] == pytest.approx(7 / 12) and scores["distinct_4"] == pytest.approx(2 / 4)
    assert scores["self_bleu"] == pytest.approx(2 / 3)
    assert found.metrics["perplexity"].stderr == pytest.approx(0, abs=0.1)


@pytest.mark.slow
def test_an_answer_depends_on_its_prompt_and_number_alone(places, tmp_path, monkeypatch):
    """Not on the batch, its order, or where an evaluation was interrupted."""
    model = dlm.load(places["mdm"])
    sampling = SamplingConfig(length=8, steps=4)
    texts = ["a", "b" * 60, "a", "ccc", "d" * 20]  # canvases of two sizes
    prompts = [Prompt(answers.encode_prompt(model, text, False), text, 10 + i) for i, text in enumerate(texts)]

    def write(session, some, batch_size):
        return [record["answer"] for record in answers.answer(session, "write", some, sampling, batch_size)]

    whole = write(Session(model), prompts, 2)
    assert len(set(whole)) == 5  # also the equal prompts, by their numbers
    assert write(Session(model), prompts[::-1], 2) == whole[::-1]
    short = [prompts[i] for i in (0, 2, 3, 4)]
    assert write(Session(model), short, 4) == [whole[i] for i in (0, 2, 3, 4)]
    session, generate, calls = Session(model), answers.generate, []
    session.open_records(tmp_path / "a.jsonl", "t", {}, resume=False)

    def dies(*args, **kwargs):
        calls.append(kwargs["row_ids"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(answers, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        write(session, prompts, 2)
    again = Session(model)
    again.open_records(tmp_path / "a.jsonl", "t", {}, resume=True)
    assert write(again, prompts, 2) == whole
    assert sum(r == calls[0][0] for call in calls[2:] for r in call) == 0  # what was finished is not written again


def test_settings_without_end_are_taken_up_again(places, tmp_path, monkeypatch):
    """An infinite penalty is written as null, which must not look like another setting."""
    answers_as_written(monkeypatch, lambda r: "x")
    options = {"data": places["couplets_json"], "output": tmp_path / "r.json"}
    first = dlm.evaluate(places["mdm"], "poems", **options)
    assert dlm.evaluate(places["mdm"], "poems", **options, resume=True).metrics == first.metrics


def test_a_task_leaves_out_what_does_not_fit_and_says_so(places, monkeypatch, tmp_path):
    answers_as_written(monkeypatch, lambda r: "3")
    long = {"question": "x" * 90, "answer": "#### 3"}
    (tmp_path / "long.jsonl").write_text(lines([long, PROBLEMS[0]]))
    result = dlm.evaluate(places["mdm"], "gsm8k", data=str(tmp_path / "long.jsonl"), sampling=SamplingConfig(length=32))
    assert values(result)["too_long"] == 1 == values(result)["problems"] == values(result)["flexible_match"]
