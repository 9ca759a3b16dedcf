"""Tasks in which a model writes: scores of known texts, prompts, and answers that depend on nothing else."""

import dataclasses
import gzip
import json
import math
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from support.command_line import assert_one_line
from support.slow_cases import thinned
from support.written_answers import (
    EOS,
    PROBLEMS,
    YEARS,
    answers_as_written,
    gaps_as_written,
    lines,
    make_places,
    text_of,
    values,
)

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.data import chat_templates
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers, gsm8k, lambada, report, temporal_shift
from diffusionlm.evaluation.answers import Prompt
from diffusionlm.evaluation.harness import formats
from diffusionlm.evaluation.session import Session
from diffusionlm.sampling.config import SamplingConfig


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("generation"))


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


@pytest.mark.parametrize("file", ["passages_jsonl", "passages_txt"])
def test_lambada_gives_the_number_of_tokens(file, places, monkeypatch):
    seen = gaps_as_written(monkeypatch, lambda r: [" cat", " meat"][r])
    result = dlm.evaluate(places["mdm"], "lambada", data=places[file], examples=1)
    assert seen == {0: [EOS, *b"he saw the", *[None] * 4], 1: [EOS, *b"she ate all", *[None] * 5]}
    found = values(result)
    assert (found["drawn_match"], found["passages"], found["too_long"]) == (0.5, 2, 0)
    assert result.metrics["drawn_match"].stderr == pytest.approx(0.5)


def test_greedy_match_of_lambada_is_that_of_the_model(places, monkeypatch):
    gaps_as_written(monkeypatch, lambda r: "x" * 9)
    model = dlm.load(places["mdm"])
    result = dlm.evaluate(model, "lambada", data=places["passages_jsonl"])
    pairs = [("he saw the", " cat"), ("she ate all", " fish")]
    assert values(result)["greedy_match"] == np.mean(model.is_greedy(pairs))
    assert result.forwards == (1 + 4) + (1 + 5)  # one to draw, and one for each token that greedy decoding reveals


def test_the_last_word_follows_the_last_space(tmp_path):
    """Passage 426 of LAMBADA's file ends with "of", two line breaks and "Power", which are one word there."""
    (tmp_path / "one.jsonl").write_text(lines([{"text": "some kind of\n\nPower"}]))
    assert list(lambada._passages(str(tmp_path / "one.jsonl"))) == [("some kind", "of\n\nPower")]


def test_passages_are_split_as_published(tmp_path, data_dir):
    """The pairs of LAMBADA's file come out of the pairs, and of whole passages."""
    path = Path(data_dir) / "eval/lambada/lambada_openai.jsonl"
    pairs = [(pair["context"], pair["continuation"]) for pair in map(json.loads, path.read_text().splitlines())]
    passages = [{"text": f"{context} {word}"} for context, word in pairs]
    (tmp_path / "whole.jsonl").write_text(lines(passages))
    assert len(pairs) == 5153 and list(lambada._passages(str(path))) == pairs
    assert list(lambada._passages(str(tmp_path / "whole.jsonl"))) == pairs
    harness = [formats.lambada(passage, "here") for passage in passages]
    assert [(doc["context"], doc["word"]) for doc in harness] == [(context, f" {word}") for context, word in pairs]


@pytest.mark.slow
def test_temporal_shift_of_a_uniform_model(places):
    """Every byte costs log V, in every bin."""
    options = {"data": places["years_jsonl"], "width": 50}
    result = dlm.evaluate(places["uniform"], "temporal_shift", **options)
    found = values(result)
    expected = {"1800-1849 ": (2, 8), "1850-1899 ": (2, 92), "": (4, 100)}
    assert len(found) == 5 * len(expected)
    for prefix, (documents, tokens) in expected.items():
        assert (found[f"{prefix}documents"], found[f"{prefix}tokens"]) == (documents, tokens)
        assert found[f"{prefix}nats_per_token"] == pytest.approx(math.log(257), rel=1e-5)
        assert found[f"{prefix}bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-5)
        assert result.metrics[f"{prefix}nats_per_token"].stderr == pytest.approx(0, abs=1e-4)
    single = dlm.evaluate(places["uniform"], "temporal_shift", data=places["years_jsonl"], first_tokens=2)
    assert values(single)["1899 tokens"] == 2 and single.metrics["1899 nats_per_token"].stderr is None


@pytest.mark.slow
def test_a_bin_costs_what_its_documents_cost(places, tmp_path):
    (tmp_path / "late.jsonl").write_text(lines(YEARS[2:]))
    shift = values(dlm.evaluate(places["arm"], "temporal_shift", data=places["years_jsonl"], width=50))
    alone = values(dlm.evaluate(places["arm"], "perplexity", data=str(tmp_path / "late.jsonl")))
    for name in ("nats_per_token", "perplexity", "bits_per_byte"):
        assert shift[f"1850-1899 {name}"] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("start", [{}, {"start_id": None}])
def test_both_tasks_of_perplexity_count_the_same_bytes(start, places, tmp_path):
    """Also of a tokenizer that adds a space to a text, which is no byte of it."""

    class Spaced(ByteTokenizer):
        def encode(self, text, *, inside=False, special=False):
            return super().encode(text if inside else f" {text}")

    (tmp_path / "texts.jsonl").write_text(lines([{"text": "\u00e9bc", "year": 1}, {"text": "defg", "year": 1}]))
    model = dlm.load(places["uniform"])
    model = dataclasses.replace(model, tokenizer=Spaced(), sidecar=dataclasses.replace(model.sidecar, canvas=start))
    tasks = ("perplexity", "temporal_shift")
    plain, shift = (values(dlm.evaluate(model, task, data=str(tmp_path / "texts.jsonl"))) for task in tasks)
    # The scored tokens are the added space, where it does not stand in for a start token, and 4 bytes of each text.
    scored = 10 if model.encode("")[:1] == [EOS] else 8
    assert plain["tokens"] == shift["tokens"] == scored and plain["bytes"] == 8
    assert plain["bits_per_byte"] == pytest.approx(math.log2(257) * scored / 8, rel=1e-5)
    assert shift["bits_per_byte"] == shift["1 bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-9)
    first = temporal_shift._read(model, str(tmp_path / "texts.jsonl"), ("text", "year"), None, 3, None)
    assert first.n_bytes == ([2, 2] if scored == 10 else [3, 3])  # of the first three scored tokens


@pytest.mark.parametrize("start", [{}, {"start_id": None}])
def test_a_part_of_a_text_has_no_bytes_of_the_rest(start, places, tmp_path):
    """Also where the tokenizer makes the rest shorter than it was: two characters are composed into one there."""

    class Composing(ByteTokenizer):
        def encode(self, text, *, inside=False, special=False):
            return super().encode(unicodedata.normalize("NFC", text))

    (tmp_path / "texts.jsonl").write_text(lines([{"text": "abcdefgh" + "e\u0301" * 500, "year": 1}]))
    model = dlm.load(places["uniform"])
    model = dataclasses.replace(model, tokenizer=Composing(), sidecar=dataclasses.replace(model.sidecar, canvas=start))
    documents = temporal_shift._read(model, str(tmp_path / "texts.jsonl"), ("text", "year"), None, 4, None)
    assert documents.n_bytes == [4] and len(documents.tokens[0]) == 5


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 3, "year": 1}, "field 'text' is int, not a string"),
        ({"text": "a", "year": 1.5}, "field 'year': 1.5 is neither an integer nor a text"),
    ],
)
def test_a_broken_field_is_named(record, message, places, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(lines([record]))
    assert cli.main(["evaluate", places["arm"], "temporal_shift", "--data", str(tmp_path / "bad.jsonl")]) == 2
    assert_one_line(capsys.readouterr(), [f"bad.jsonl:1: {message}"])


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
