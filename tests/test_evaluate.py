"""`evaluate`: its figures are the model's own, its JSON has the promised keys, and mistakes are one line."""

import json
import math
import re

import pytest
from helpers import make_params

import diffusionlm as dlm
from diffusionlm import checkpoint, cli, config
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError

TEXTS = ["one text", "another, longer text", "x", "the last of these texts"]
FEW = {"passes": 8, "draws": 2}


@pytest.fixture(scope="module", params=["arm", "mdm"])
def model(request, tmp_path_factory):
    """A random model with the byte tokenizer."""
    arm = request.param == "arm"
    cfg = ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=257)
    cfg = config.from_dict(ModelConfig, config.to_dict(cfg) | {"max_length": 24, "causal": arm, "mask_row": not arm})
    sidecar = checkpoint.Sidecar(
        request.param,
        config.to_dict(cfg),
        config.to_dict(DiffusionConfig()),
        None if arm else 257,
        eos_id=256,
        alignment="shifted" if arm else "same",
        tokenizer=ByteTokenizer().to_dict(),
    )
    path = tmp_path_factory.mktemp("models") / request.param
    checkpoint.save_params(path, make_params(cfg), sidecar)
    return path


@pytest.fixture
def data(tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return tmp_path / "texts.jsonl"


def test_figures_are_nats_over_tokens_and_bits_over_bytes(model, data, capsys):
    args = ["evaluate", str(model), "perplexity", "--data", str(data), "--limit", "3", "--passes", "8", "--draws", "2"]
    assert cli.main([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    loaded = dlm.load(model)
    scored = loaded.perplexity(TEXTS[:3], dlm.LikelihoodConfig(**FEW))
    n_bytes = sum(len(text) for text in TEXTS[:3])  # ASCII, a token each
    assert report["task"] == "perplexity" and report["config"]["limit"] == 3
    assert report["counts"] == {"documents": 3, "tokens": n_bytes, "bytes": n_bytes}
    metrics = report["metrics"]
    nats = -sum(one.log_likelihood for one in scored.documents)
    expected = {"nats_per_token": nats / n_bytes, "perplexity": math.exp(nats / n_bytes)}
    expected["bits_per_byte"] = nats / n_bytes / math.log(2)
    assert {name: metric["value"] for name, metric in metrics.items()} == pytest.approx(expected)
    assert metrics["nats_per_token"]["stderr"] == pytest.approx(scored.stderr / n_bytes)
    assert metrics["bits_per_byte"]["stderr"] == pytest.approx(scored.stderr / math.log(2) / n_bytes)
    # The standard error of an exponential, to first order.
    up = math.exp(expected["nats_per_token"] + 1e-4 * metrics["nats_per_token"]["stderr"])
    assert metrics["perplexity"]["stderr"] == pytest.approx((up - expected["perplexity"]) / 1e-4, rel=1e-3)
    assert cli.main(args) == 0
    assert f"bits_per_byte        {expected['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_a_single_text_has_no_standard_error(model, tmp_path):
    (tmp_path / "one.txt").write_text("a text that is longer than the context of this model")
    result = dlm.evaluate(model, "perplexity", data=str(tmp_path / "one.txt"), settings=dlm.LikelihoodConfig(**FEW))
    assert result.metrics["bits_per_byte"].stderr is None and result.counts["documents"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name the checkpoint and the task first"),
        (["MODEL"], "name the checkpoint and the task first: .*; tasks: perplexity"),
        (["MODEL", "perplexty"], "unknown task 'perplexty'; did you mean 'perplexity'"),
        (["MODEL", "perplexity"], "--data is missing"),
        (["MODEL", "perplexity", "--data", "none.jsonl"], "no such text, jsonl file"),
        (["MODEL", "perplexity", "--data", "DATA", "--limit", "0"], "limit=0 must be at least 1"),
        (["MODEL", "perplexity", "--data", "DATA", "--limits", "1"], "unknown option 'limits'; did you mean 'limit'"),
        (["MODEL", "perplexity", "--data", "DATA", "--text_field", "txt"], "no field 'txt'; did you mean 'text'"),
        (["nowhere", "perplexity", "--data", "DATA"], "no checkpoint at"),
    ],
)
def test_mistakes_are_one_line(args, message, model, data, capsys):
    given = [{"MODEL": str(model), "DATA": str(data)}.get(arg, arg) for arg in args]
    assert cli.main(["evaluate", *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


def test_help_lists_tasks_and_their_options(model, capsys):
    assert cli.main(["evaluate", "--help"]) == 0 and "Tasks: perplexity" in capsys.readouterr().out
    assert cli.main(["evaluate", str(model), "perplexity", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--data" in out and "--passes" in out and "--model" not in out


def test_nothing_to_score(model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        dlm.evaluate(model, "perplexity", data=str(tmp_path / "empty.jsonl"))
