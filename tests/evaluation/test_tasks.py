"""Infilling and perplexity: figures that are known by construction, and one line for every mistake."""

import dataclasses
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from support.command_line import assert_one_line
from support.slow_cases import thinned
from support.stories import STORIES
from support.tiny_checkpoint import random_params, save

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.evaluation import gaps, infilling
from diffusionlm.evaluation.session import Session
from diffusionlm.evaluation.stories import Row
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import Infilling

EOS = ByteTokenizer.eos_id
LINES = [json.dumps(story._asdict()) for story in STORIES]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Checkpoints and files, by name; the `uniform` models give every token the same probability."""
    directory = tmp_path_factory.mktemp("evaluate")
    flat = {"head": jnp.zeros_like(random_params()["head"])}
    found = {
        "mdm": save(directory / "mdm"),
        "arm": save(directory / "arm", "arm"),
        "uniform_mdm": save(directory / "uniform_mdm", **flat),
        "uniform_arm": save(directory / "uniform_arm", "arm", **flat),
        "tmp": str(directory),
    }
    files = {
        "stories.jsonl": "\n".join([*LINES[:1], "", *LINES[1:]]),
        "texts.jsonl": '{"text": "a first text"}\n{"text": ""}\n{"text": "b\\u00e9"}\n{"text": "' + "long " * 60 + '"}',
        "body.jsonl": '{"body": "abc"}\n',
        "short.jsonl": '{"text": "One. Two. Three."}\n{"text": "One. Two! Three? Four."}',
        "long.jsonl": json.dumps({"text": "A long sentence of a story that does not fit. " * 5}),
        "cut.jsonl": LINES[0] + '\n{"before": "x", "middle"',
        "half.jsonl": LINES[0] + '\n{"before": "x", "middle": "y"}',
        "empty.jsonl": '{"before": "x", "middle": " ", "after": "z"}',
        "number.jsonl": '{"before": "x", "middle": 3, "after": "z"}',
        "nothing.jsonl": "\n\n",
        "plain.txt": "One document.\nOf two lines.",
    }
    for name, content in files.items():
        (directory / name).write_text(content)
    return found | {name.partition(".")[0]: str(directory / name) for name in files}


def parts_as_written(monkeypatch, writes):
    """Every row is filled by `writes`, a function of the index of its story that gives text."""
    seen = []

    def infill(params, cfg, templates, sampling, *, row_ids):
        assert cfg.eos_ids == (ByteTokenizer.eos_id,) and ByteTokenizer.eos_id in cfg.suppressed_ids
        rows = []
        for r, template in zip(row_ids, templates, strict=True):
            seen.append((r, template))
            new = writes(r).encode()
            assert len(new) <= template.count(None)
            left = iter([*new, *[ByteTokenizer.eos_id] * template.count(None)])
            rows.append([next(left) if token is None else token for token in template])
        return Infilling(rows, [()] * len(rows), np.ones(len(rows)), 0.0, None)

    monkeypatch.setattr(gaps, "infill", infill)
    return seen


def values(result):
    return {name: metric.value for name, metric in result.metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, batch_size",
    [("mdm", 2), ("arm", 16)]
    + [pytest.param(*setting, marks=pytest.mark.slow) for setting in (("mdm", 1), ("mdm", 16), ("arm", 1), ("arm", 2))],
)
def test_the_true_middle_has_all_scores(name, batch_size, places, monkeypatch):
    seen = parts_as_written(monkeypatch, lambda r: STORIES[r].middle)
    result = dlm.evaluate(places[name], "infilling", data=places["stories"], batch_size=batch_size, examples=2)
    whole = {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "exact_match": 1.0}
    assert values(result) == whole | {"stories": 3, "too_short": 0, "too_long": 0}
    errors = {name: metric.stderr for name, metric in result.metrics.items() if metric.stderr}
    assert errors == {"exact_match": 1 / (3 + 1)}  # a share of 1 over 3 stories is not certain
    assert result.examples == [story._asdict() | {"fill": story.middle} for story in STORIES[:2]]
    for r, template in seen:
        gap = [None] * len(STORIES[r].middle)
        after = STORIES[r].after.encode() if name == "mdm" else b""  # the baseline sees the text before only
        assert template == [ByteTokenizer.eos_id, *STORIES[r].before.encode(), *gap, *after]


def test_other_words_have_no_score(places, monkeypatch):
    parts_as_written(monkeypatch, lambda r: " zq wv xk")
    result = dlm.evaluate(places["mdm"], "infilling", data=places["stories"])
    assert [values(result)[name] for name in ("rouge1", "rouge2", "rougeL", "exact_match")] == [0, 0, 0, 0]
    assert result.examples is None


def test_scores_and_standard_errors_of_known_overlaps(places, monkeypatch):
    """Middles of 6, 6 and 3 words: all right; the first three of six; in another case and with other signs."""
    fills = [STORIES[0].middle, " She ran home or so to", " TWO, THREE four"]
    parts_as_written(monkeypatch, lambda r: fills[r])
    result = dlm.evaluate(places["mdm"], "infilling", data=places["stories"])
    pairs = {"rouge1": [1, 3 / 6, 1], "rouge2": [1, 2 / 5, 1], "rougeL": [1, 3 / 6, 1], "exact_match": [1, 0, 0]}
    for name, expected in pairs.items():
        assert result.metrics[name].value == pytest.approx(np.mean(expected))
        assert result.metrics[name].stderr == pytest.approx(np.std(expected, ddof=1) / math.sqrt(3))
    one = dlm.evaluate(places["mdm"], "infilling", data=places["stories"], limit=1)
    assert one.metrics["rouge1"] == (1, None) and one.metrics["stories"].value == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdm", pytest.param("arm", marks=pytest.mark.slow)])
def test_a_seed_gives_the_same_fills(name, places):
    sampling = SamplingConfig(seed=3, temperature=0.5, stop_at_eos=False)
    model = dlm.load(places[f"uniform_{name}"])
    first, same, other = (
        infilling.infilling(Session(model), data=places["stories"], examples=3, sampling=settings)
        for settings in (sampling, sampling, dataclasses.replace(sampling, seed=4))
    )
    assert first.config["length"] is first.config["steps"] is None  # each gap has its own
    assert first == same and first.examples != other.examples
    assert len({example["fill"][:10] for example in first.examples}) == 3  # each with noise of its own


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 5])
def test_a_fill_depends_on_its_story_alone(steps, places):
    """Not on the stories beside it, whose middles have other numbers of tokens, nor on the batch."""
    model, sampling = dlm.load(places["mdm"]), SamplingConfig(seed=3, strategy="fixed_count", steps=steps)
    whole = dlm.evaluate(model, "infilling", data=places["stories"], examples=3, sampling=sampling)
    for limit, batch_size in [(1, 16), (2, 16), (3, 1)]:
        options = {"limit": limit, "batch_size": batch_size, "examples": 3, "sampling": sampling}
        assert dlm.evaluate(model, "infilling", data=places["stories"], **options).examples == whole.examples[:limit]


@pytest.mark.slow
def test_steps_that_are_not_set_are_the_tokens_of_each_middle(places):
    """Then every pass reveals one token; a model that draws a random one has no early end."""
    model = dlm.load(places["mdm"])
    rows = [Row([EOS], [1] * n, [2, 3]) for n in (7, 3, 5, 3)]
    filled = gaps.fill_middles(model, rows, [2, 0, 3, 1], SamplingConfig(strategy="fixed_count"))
    assert [nfe for _, nfe in filled] == [5, 7, 3, 3]


@pytest.mark.slow
def test_a_batch_is_not_filled_up_with_copies(places, monkeypatch):
    sizes, infill = [], gaps.infill

    def counts(params, cfg, templates, *args, **kwargs):
        sizes.append(len(templates))
        return infill(params, cfg, templates, *args, **kwargs)

    monkeypatch.setattr(gaps, "infill", counts)
    dlm.evaluate(places["mdm"], "infilling", data=places["stories"], batch_size=32, sampling=SamplingConfig(steps=1))
    assert sizes == [len(STORIES)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform_mdm", "uniform_arm"])
def test_perplexity_of_a_uniform_model(name, places):
    """Every byte costs log V; also in documents longer than the context."""
    settings = dlm.LikelihoodConfig(draws=2)
    result = dlm.evaluate(places[name], "perplexity", data=places["texts"], settings=settings)
    n_bytes = len("a first text") + 3 + 300
    assert {key: values(result)[key] for key in ("tokens", "bytes", "documents")} == {
        "tokens": n_bytes,
        "bytes": n_bytes,
        "documents": 3,
    }
    found = values(result)
    assert found["nats_per_token"] == pytest.approx(math.log(257), rel=1e-5)
    assert found["perplexity"] == pytest.approx(257, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-5)
    errors = [result.metrics[key].stderr for key in ("nats_per_token", "perplexity", "bits_per_byte")]
    assert errors == ([0, 0, 0] if name == "uniform_arm" else pytest.approx([0, 0, 0], abs=1e-2))


@pytest.mark.slow
def test_standard_errors_of_a_bound_have_the_units_of_their_figures(places):
    model = dlm.load(places["mdm"])
    settings = dlm.LikelihoodConfig(draws=2)
    result = dlm.evaluate(model, "perplexity", data=places["texts"], limit=2, settings=settings)
    direct = model.perplexity(["a first text", "b\u00e9"], settings)
    n = len("a first text") + 3
    error = direct.estimate_stderr / n
    assert error > 0 and result.metrics["nats_per_token"] == pytest.approx((direct.nats / n, error))
    assert result.metrics["bits_per_byte"].stderr == pytest.approx(error / math.log(2))
    # d exp(x) = exp(x) dx
    assert result.metrics["perplexity"].stderr == pytest.approx(math.exp(direct.nats / n) * error)


def test_a_text_file_is_one_document(places):
    result = dlm.evaluate(places["uniform_arm"], "perplexity", data=places["plain"])
    assert values(result)["documents"] == 1 and values(result)["tokens"] == len("One document.\nOf two lines.")


def test_a_text_with_a_token_that_stands_for_masks_is_refused_by_its_place(places):
    model = dlm.load(places["mdm"])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, mask_id=ord("f")))
    with pytest.raises(UserError, match=r"texts.jsonl:1 has the token 102, which stands for masks"):
        dlm.evaluate(model, "perplexity", data=places["texts"])


@pytest.mark.slow
def test_the_command(places, capsys):
    args = ["evaluate", places["uniform_arm"], "perplexity", "--data", places["texts"], "--limit", "1"]
    assert cli.main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        set(found) == {"task", "metrics", "config", "forwards", "seconds", "checkpoint", "passed_over"}
        and found["task"] == "perplexity"
    )
    assert set(found["metrics"]["nats_per_token"]) == {"value", "stderr"}
    assert (found["config"]["limit"], found["metrics"]["documents"]["value"]) == (1, 1)
    assert cli.main(args) == 0
    assert f"{math.log(257):.4f}" in capsys.readouterr().out
    args = ["evaluate", places["mdm"], "infilling", "--data", places["stories"], "--limit", "1", "--steps", "4"]
    assert cli.main([*args, "--examples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(example) for example in found["examples"]] == [{"before", "middle", "after", "fill"}]
    assert found["config"]["steps"] == 4 and found["metrics"]["rouge1"]["stderr"] is None
    assert cli.main([*args, "--examples", "1"]) == 0
    assert STORIES[0].before in capsys.readouterr().out
    for words in (["--help"], [places["mdm"], "--help"]):
        assert cli.main(["evaluate", *words]) == 0
        assert "infilling" in capsys.readouterr().out
    assert cli.main(["evaluate", places["mdm"], "infilling", "--help"]) == 0
    assert "--temperature" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "parts"),
    thinned(
        [
            ("evaluate", ["CHECKPOINT", "perplexity"]),
            ("evaluate {mdm}", ["TASK", "infilling"]),
            ("evaluate {mdm} infiling --data {stories}", ["'infiling'", "'infilling'"]),
            ("evaluate {mdm} perplexity", ["missing --data ("]),
            ("evaluate {mdm} perplexity --data {tmp}/none.jsonl", ["none.jsonl"]),
            ("evaluate {tmp}/none perplexity --data {texts}", ["{tmp}/none", "does not exist"]),
            ("evaluate {mdm} perplexity --data {texts} --limit 0", ["limit=0"]),
            ("evaluate {mdm} perplexity --data {texts} --limt 3", ["'limt'", "'limit'"]),
            ("evaluate {mdm} perplexity --data {texts} --limit x", ["limit=x must be an integer, or be left out"]),
            ("evaluate {mdm} perplexity --data {texts} --draws 0", ["draws=0"]),
            ("evaluate {mdm} perplexity --data {texts} --estimator exact", ["'exact'"]),
            (
                "evaluate {mdm} perplexity --data {texts} --field txt",
                ["texts.jsonl:1: no field 'txt' among 'text'", "--field text)"],
            ),
            ("evaluate {mdm} perplexity --data {nothing}", ["no text"]),
            ("evaluate {mdm} perplexity --data {cut} --field before", ["cut.jsonl:2", "JSON"]),
            ("evaluate {mdm} infilling --data {cut}", ["cut.jsonl:2", "JSON"]),
            ("evaluate {mdm} infilling --data {half}", ["half.jsonl:2", "'after'"]),
            ("evaluate {mdm} infilling --data {empty}", ["empty.jsonl:1", "'middle'"]),
            ("evaluate {mdm} infilling --data {number}", ["number.jsonl:1", "'middle' is int"]),
            (
                "evaluate {mdm} infilling --data {body}",
                ["body.jsonl:1: no field 'text' among 'body'", "--field NAME", "'before', 'middle', 'after'"],
            ),
            ("evaluate {mdm} infilling --data {short}", ["no story", "2 have fewer than 5"]),
            ("evaluate {mdm} infilling --data {long}", ["no story", "1 are longer", "96"]),
            ("evaluate {mdm} infilling --data {stories} --batch_size 0", ["batch_size=0"]),
            (
                "evaluate {mdm} infilling --data {stories} --length 5",
                ["length=5 has no effect in infilling", "leave it out"],
            ),
            ("evaluate {mdm} perplexity --data {texts} --resume", ["--resume needs --output FILE"]),
            ("evaluate {mdm} infilling --data {stories} --strategy rand", ["'rand'", "'random'"]),
            ("evaluate {arm} infilling --data {stories} --steps 2", ["steps=2", "autoregressive"]),
        ],
        every=2,
    ),
)
def test_mistakes_are_one_line(command, parts, places, capsys):
    words = [word.format(**places) for word in command.split()]
    assert cli.main(words) == 2
    assert_one_line(capsys.readouterr(), [part.format(**places) for part in parts])


def test_a_missing_package_is_one_line(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"rouge-score; in a checkout of diffusionlm, pip install -e '\.\[eval\]'"):
        dlm.evaluate(places["mdm"], "infilling", data=places["stories"])


def test_mistakes_from_python(places):
    with pytest.raises(UserError, match="'limt'.*'limit'"):
        dlm.evaluate(places["mdm"], "perplexity", data=places["texts"], limt=3)
    with pytest.raises(UserError, match="needs data"):
        dlm.evaluate(places["mdm"], "perplexity")
    model = dataclasses.replace(dlm.load(places["mdm"]), tokenizer=None)
    reused = dataclasses.replace(model, config=dataclasses.replace(model.config, mask_id=102))
    for one in (model, reused):
        for task, data in (("infilling", "stories"), ("perplexity", "texts")):
            with pytest.raises(UserError, match="no tokenizer; import it again"):
                dlm.evaluate(one, task, data=places[data])


def test_the_help_of_all_verbs_needs_no_jax():
    code = "import sys; from diffusionlm.cli.main import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
