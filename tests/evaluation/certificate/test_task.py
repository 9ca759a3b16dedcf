"""The command: figures, verdicts, exit codes, resuming, other families, and one line for every mistake."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.command_line import assert_one_line
from support.foreign_weights import TINY_SMDM, import_options, make_source
from support.tiny_checkpoint import save

import diffusionlm as dlm
from diffusionlm import presets
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.cli import main as cli
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.evaluation.certificate.checks import CHECKS
from diffusionlm.evaluation.certificate.method import LibraryMethod
from diffusionlm.evaluation.certificate.reference import Reference
from diffusionlm.evaluation.certificate.subject import Subject, choose_samples
from diffusionlm.evaluation.certificate.task import _notes as certificate_notes
from diffusionlm.evaluation.certificate.verdicts import judge
from diffusionlm.evaluation.results import Metric
from diffusionlm.interop.importing import import_weights

TEXTS = ["A first text, which is long enough.", "The second one h\u00e9re is a little longer than that.", "And " * 18]
QUICK = ["--draws", "4", "--limit", "2", "--short_targets", "1"]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Checkpoints and files by name."""
    directory = tmp_path_factory.mktemp("certificate")
    files = {
        "texts": [{"text": text} for text in TEXTS],
        "short": [{"text": "a"}, {"text": "b"}],
        "nothing": [{"text": ""}],
        "mixed": [{"text": "long " * 50}, {"text": "ab"}],
    }
    places = {name: jsonl(directory / f"{name}.jsonl", rows) for name, rows in files.items()}
    return places | {"tmp": str(directory), "mdm": save(directory / "mdm"), "arm": save(directory / "arm", "arm")}


def verdicts(result):
    return {check["name"]: check["verdict"] for check in result.checks}


@pytest.mark.slow
def test_the_command(places, tmp_path, capsys):
    """Figures are those of `perplexity`; the chain rule stands beside its bound; a resumed certificate is the same."""
    output = tmp_path / "out.json"
    args = ["evaluate", places["mdm"], "certificate", "--data", places["texts"], *QUICK, "--output", str(output)]
    assert cli.main([*args, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads(output.read_text())
    assert saved["checks"] == printed["checks"] and saved["metrics"] == printed["metrics"]
    assert [set(check) for check in printed["checks"]] == [
        {"name", "verdict", "value", "tolerance", "explanation"}
    ] * 21
    found = {check["name"]: check["verdict"] for check in printed["checks"]}
    assert set(found) == {*CHECKS, "estimators_agree", "draws_agree", "claims"}
    assert {found.pop("claims"), found.pop("no_leak")} == {"not applicable"} and set(found.values()) == {"pass"}
    metrics = {name: metric["value"] for name, metric in printed["metrics"].items()}
    n_bytes = sum(len(text.encode()) for text in TEXTS[:2])
    assert (metrics["tokens"], metrics["bytes"], metrics["documents"]) == (n_bytes, n_bytes, 2)
    model = dlm.load(places["mdm"])
    direct = model.perplexity(TEXTS[:2], dlm.LikelihoodConfig(draws=4))
    assert metrics["nats_per_token"] == pytest.approx(direct.nats_per_token, rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(direct.bits_per_byte, rel=1e-5)
    assert metrics["bits_per_byte_low"] < metrics["bits_per_byte"] < metrics["bits_per_byte_high"]
    chain = model.perplexity(TEXTS[:1], dlm.LikelihoodConfig(estimator="chain_rule"))
    assert metrics["left_to_right_nats_per_token"] == pytest.approx(chain.nats_per_token, rel=1e-5)
    assert 0 < metrics["share_below_t_0.001"] < 2e-3
    assert metrics["passed"] == 19 and metrics["failed"] == 0
    lines = output.with_name("out.items.jsonl").read_text().splitlines()
    records = [json.loads(line)["record"] for line in lines[1:]]
    repeated = next(record for record in records if "scores" in record)
    assert repeated["forwards"] == 64 * 16 * 8  # whatever the draws of the texts: with few, intervals are too narrow
    output.with_name("out.items.jsonl").write_text("\n".join([*lines[:8], ""]))
    assert cli.main([*args, "--resume"]) == 0
    resumed = json.loads(output.read_text())
    assert resumed["metrics"] == saved["metrics"] and resumed["checks"] == saved["checks"]
    assert resumed["forwards"] == saved["forwards"] > 0
    shown = capsys.readouterr().out
    assert "round_trip" in shown and "\nclaims is not applicable: No claims were given (--claims FILE).\n" in shown
    assert cli.main(["evaluate", "report", str(output)]) == 0
    assert "| nats_per_token |" in capsys.readouterr().out


@pytest.mark.slow
def test_an_autoregressive_model(places, monkeypatch):
    """Its likelihood is exact, and what is about bounds does not apply; matrices are multiplied in all their bits."""

    def in_all_bits(subject):
        return judge(float(jax.config.jax_default_matmul_precision != "highest"), 0.0, "")

    monkeypatch.setitem(CHECKS, "round_trip", in_all_bits)
    result = dlm.evaluate(places["arm"], "certificate", data=places["texts"], limit=2)
    found = verdicts(result)
    bounds = {
        "pairs_below_exact",
        "estimate_matches_exact",
        "bound_not_below_exact",
        "interval",
        "clipping",
        "chain_rule",
    }
    others = {"estimators_agree", "draws_agree", "mask_not_scored", "claims"}
    assert {name for name, verdict in found.items() if verdict == "not applicable"} == bounds | others
    assert {verdict for name, verdict in found.items() if name not in bounds | others} == {"pass"}
    direct = dlm.load(places["arm"]).perplexity(TEXTS[:2])
    assert result.metrics["nats_per_token"] == pytest.approx((direct.nats_per_token, 0), rel=1e-6)
    assert "nats_per_token_iid" not in result.metrics and "left_to_right_nats_per_token" not in result.metrics


@pytest.mark.slow
def test_a_failed_check_is_exit_code_1(places, tmp_path, capsys):
    """Claims of half the nats are outside the interval; those of the right ones are not."""
    model = dlm.load(places["arm"])
    nats = [model.perplexity(text).nats for text in TEXTS[:2]]
    command = ["evaluate", places["arm"], "certificate", "--data", places["texts"], "--limit", "2", "--claims"]
    right = jsonl(tmp_path / "right.jsonl", [{"text": t, "nats": x} for t, x in zip(TEXTS, nats, strict=False)])
    assert cli.main([*command, right]) == 0
    wrong = jsonl(tmp_path / "wrong.jsonl", [{"text": TEXTS[0], "nats": nats[0] / 2}])
    capsys.readouterr()
    assert cli.main([*command, wrong, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in printed["checks"] if check["verdict"] == "fail"] == ["claims"]
    assert printed["metrics"]["failed"]["value"] == 1


class Letters(ByteTokenizer):
    """A tokenizer of the letters a to z, as the ids 8 to 33 of a vocabulary of 40."""

    vocab_size, eos_id, pad_id = 40, 2, 2

    def encode(self, text, *, inside=False, special=False):
        return [ord(letter) - ord("a") + 8 for letter in text]

    def decode(self, ids, *, inside=False):
        return "".join(chr(i - 8 + ord("a")) for i in ids if 8 <= i < 34)

    def token_bytes(self):
        return ((np.arange(40) >= 8) & (np.arange(40) < 34)).astype(np.int32)


def imported(family, directory):
    """A tiny random model in a family's layout, with a tokenizer of letters."""
    import_weights(make_source(family, directory / "source"), directory / "model", **import_options(family))
    return dataclasses.replace(dlm.load(directory / "model", dtype="float32"), tokenizer=Letters())


LETTERS = "thequickbrownfoxjumpsoverthela"


@pytest.mark.slow
def test_a_shifted_model(tmp_path):
    """The state before a token predicts it; all checks are in `test_imported_families`."""
    model = imported("dream", tmp_path)
    assert model.config.shifted
    samples, reference = choose_samples(model, [model.encode(LETTERS)], 1), Reference(model)
    method = LibraryMethod(model, dlm.LikelihoodConfig())
    subject = Subject(model, method, reference, [LETTERS], samples, reference.costs(samples), [])
    names = ("exact_score_matches", "sums_to_one", "padding", "first_token", "bytes_counted", "tokens_counted")
    assert {name: CHECKS[name](subject).verdict for name in names} == dict.fromkeys(names, "pass")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dream", "llada", "smdm", "diffugpt"])
def test_imported_families(family, tmp_path, monkeypatch):
    """All checks; where the released code may predict the mask, random weights do, and that is found."""
    if family == "smdm":
        monkeypatch.setattr(presets, "names", lambda: ["smdm_tiny"])
        monkeypatch.setattr(presets, "get", lambda name: TINY_SMDM)
    model = imported(family, tmp_path)
    data = jsonl(tmp_path / "texts.jsonl", [{"text": LETTERS}])
    result = dlm.evaluate(model, "certificate", data=data, draws=1, short_targets=1)
    found = verdicts(result)
    failed = {name for name, verdict in found.items() if verdict == "fail"}
    assert failed == ({"mask_not_predicted"} if not model.config.suppressed_ids and family != "smdm" else set())
    assert result.metrics["tokens"].value == 30 - (0 if model.encode("") else 1)


@pytest.mark.slow
def test_documents_longer_than_the_context_and_too_short_ones(places):
    result = dlm.evaluate(places["arm"], "certificate", data=places["mixed"])
    assert result.metrics["tokens"].value == 252 and not result.failed
    no_start = dlm.load(places["arm"])
    sidecar = dataclasses.replace(no_start.sidecar, canvas={**no_start.sidecar.canvas, "start_id": None})
    no_start = dataclasses.replace(no_start, sidecar=dataclasses.replace(sidecar, eos_id=None))
    assert isinstance(no_start.sidecar, Sidecar) and no_start.encode("") == []
    with pytest.raises(UserError, match="no text of two tokens or more, of which the first is given"):
        dlm.evaluate(no_start, "certificate", data=places["short"])


@pytest.mark.slow
def test_damaged_parameters_are_one_line(places, tmp_path):
    model = dlm.load(places["mdm"])
    damaged = dataclasses.replace(model, params={**model.params, "head": model.params["head"] * jnp.nan})
    with pytest.raises(UserError, match="parameters are damaged"):
        dlm.evaluate(damaged, "certificate", data=places["texts"], draws=1, limit=1)


def test_a_text_with_the_mask_and_a_model_without_tokenizer(places):
    model = dlm.load(places["mdm"])
    reused = dataclasses.replace(model, config=dataclasses.replace(model.config, mask_id=ord("f")))
    with pytest.raises(UserError, match=r"texts.jsonl:1 has the token 102, which stands for masks"):
        dlm.evaluate(reused, "certificate", data=places["texts"])
    with pytest.raises(UserError, match="no tokenizer; import it again"):
        dlm.evaluate(dataclasses.replace(model, tokenizer=None), "certificate", data=places["texts"])


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("", ["missing --data ("]),
        ("--data {tmp}/none.jsonl", ["none.jsonl"]),
        ("--data {nothing}", ["no text"]),
        ("--data {short}", ["the longest text has 2 tokens", "at least 3"]),
        ("--data {texts} --dtype float16", ["'float16'", "'bfloat16'"]),
        ("--data {texts} --passes 2", ["passes=2", "8"]),
        ("--data {texts} --short_targets 0", ["short_targets=0"]),
        ("--data {texts} --chain_rule -1", ["chain_rule=-1"]),
        ("--data {texts} --limit 0", ["limit=0"]),
        ("--data {texts} --claims {tmp}/none.jsonl", ["none.jsonl"]),
        ("--data {texts} --claims {tmp}", ["{tmp}"]),
        ("--data {texts} --estimator iid", ["'estimator'"]),
    ],
)
def test_mistakes_are_one_line(command, parts, places, capsys):
    words = [word.format(**places) for word in command.split()]
    assert cli.main(["evaluate", places["mdm"], "certificate", *words]) == 2
    assert_one_line(capsys.readouterr(), [part.format(**places) for part in parts])


@pytest.mark.slow
def test_bfloat16(places):
    """Compute in the coarser format: the checks are coarser, and say where noise hides something."""
    result = dlm.evaluate(places["mdm"], "certificate", data=places["texts"], dtype="bfloat16", draws=1, limit=2)
    assert not result.failed and verdicts(result)["clipping"] == "not applicable"
    assert "own_dtype_error_per_token" in result.metrics
    assert math.isfinite(result.metrics["own_dtype_error_per_token"].value)


def test_a_tokenizer_that_changes_little_is_noted():
    """A passed round trip with a change is told below the table; a failed one is told as a failure."""

    def check(verdict, value):
        return {"name": "round_trip", "verdict": verdict, "value": value, "explanation": "changed"}

    metrics = {"passed": Metric(1), "failed": Metric(0), "not_applicable": Metric(2)}
    count = "1 of 1 checks passed, 0 failed, 2 not applicable"
    assert certificate_notes(metrics, [check("pass", 1e-4)]) == (count, "changed")
    assert certificate_notes(metrics, [check("pass", 0.0), check("fail", 0.5)]) == (count,)
