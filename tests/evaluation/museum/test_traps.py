"""Every trap is caught by the check that is named for it, which the right method passes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from evaluation.museum.traps import AUTOREGRESSIVE, TRAPS, grid_from_zero, other_schedule
from support.slow_cases import slow
from support.tiny_checkpoint import save

import diffusionlm as dlm
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.evaluation.certificate.checks import CHECKS
from diffusionlm.evaluation.certificate.figures import draws_agree, estimators_agree, score_texts, settings_of
from diffusionlm.evaluation.certificate.method import LibraryMethod
from diffusionlm.evaluation.certificate.reference import Reference
from diffusionlm.evaluation.certificate.subject import Subject, choose_samples, in_dtype, repeated
from diffusionlm.likelihood.estimators import ESTIMATORS, Estimator
from diffusionlm.likelihood.perplexity import rolling_windows

ROOT = Path(__file__).parents[3]
SETTINGS = dlm.LikelihoodConfig(draws=4)
TEXTS = ["A first text, which is long enough.", "The second one h\u00e9re is a little longer than that.", "And " * 18]
# Each of these compiles a program of its own.
COSTLY = ("FirstFree", "MaskScored", "NoiseByPlace", "OwnToken", "PaddedEos", "PaddingSeen", "VisibleEnd")


def subject_of(model, texts, settings=SETTINGS):
    documents, _ = model.encode_documents(texts)
    samples, reference = choose_samples(model, documents, 3), Reference(model)
    method = LibraryMethod(model, settings)
    return Subject(model, method, reference, texts, samples, reference.costs(samples), repeated(method, samples))


def with_method(subject, trap, checks):
    """Put a wrong method in the place of the right one; estimates are repeated where a check reads them."""
    method = trap(subject.model, subject.method.settings)
    needed = {"estimate_matches_exact", "bound_not_below_exact", "interval"} & set(checks)
    estimates = repeated(method, subject.samples) if needed else ()
    return dataclasses.replace(subject, method=method, estimates=estimates)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return subject_of(dlm.load(save(tmp_path_factory.mktemp("traps") / "mdm")), TEXTS)


def autoregressive_subject(model, texts):
    documents, _ = model.encode_documents(texts)
    samples, reference = choose_samples(model, documents, 3), Reference(model)
    return Subject(model, LibraryMethod(model, SETTINGS), reference, texts, samples, reference.costs(samples), [])


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory):
    return autoregressive_subject(dlm.load(save(tmp_path_factory.mktemp("traps") / "arm", "arm")), TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKS if name != "no_leak"])
def test_the_right_method_passes(subject, name):
    finding = CHECKS[name](subject)
    assert finding.verdict == "pass", finding


@pytest.mark.parametrize(
    "trap",
    [slow(trap) if trap.name in COSTLY else trap for trap in TRAPS],
    ids=lambda trap: f"{trap.name}-{trap.check}",
)
def test_a_trap_is_caught(subject, trap):
    finding = CHECKS[trap.check](with_method(subject, trap.method, [trap.check]))
    assert finding.verdict == "fail", finding


@pytest.mark.slow
@pytest.mark.parametrize("trap", AUTOREGRESSIVE, ids=lambda trap: f"{trap.name}-{trap.check}")
def test_a_trap_of_autoregressive_models_is_caught(autoregressive, trap):
    assert CHECKS[trap.check](autoregressive).verdict == "pass"
    finding = CHECKS[trap.check](with_method(autoregressive, trap.method, [trap.check]))
    assert finding.verdict == "fail", finding


@pytest.mark.slow
def test_an_autoregressive_model_that_reads_both_sides_is_caught(autoregressive):
    """A loader that forgets the causal mask gives a network that sees what it predicts."""
    config = autoregressive.model.config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, causal=False))
    model = dataclasses.replace(autoregressive.model, config=config)
    judged = dataclasses.replace(autoregressive, model=model, method=LibraryMethod(model, SETTINGS))
    assert CHECKS["no_leak"](judged).verdict == "fail"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "replaced", "check"),
    [
        (other_schedule, "iid", estimators_agree),
        (other_schedule, "exact_count", estimators_agree),
        (grid_from_zero, "exact_count", draws_agree),
    ],
)
def test_a_wrong_estimator_is_caught_on_whole_texts(subject, monkeypatch, plan, replaced, check):
    """A random model and three texts; the right estimators agree."""
    documents, _ = subject.model.encode_documents(TEXTS)
    windows = [rolling_windows(ids, subject.model.config.max_length) for ids in documents]
    tokens, ids = [len(document) - 1 for document in documents], [[i] for i in range(len(windows))]
    settings = settings_of(subject.model, dlm.LikelihoodConfig())
    assert check(score_texts(subject.model, windows, ids, settings), tokens).verdict == "pass"
    # The program of an estimator is kept by its name, so the wrong one has a name of its own.
    monkeypatch.setitem(ESTIMATORS, plan.__name__, Estimator(plan))
    wrong = {
        name: dataclasses.replace(chosen, estimator=plan.__name__) if chosen.estimator == replaced else chosen
        for name, chosen in settings.items()
    }
    finding = check(score_texts(subject.model, windows, ids, wrong), tokens)
    assert finding.verdict == "fail", finding


class LowerCase(ByteTokenizer):
    """A tokenizer that loses something of every text with capitals."""

    def encode(self, text, *, inside=False, special=False):
        return super().encode(text.lower())


class WrongSizes(ByteTokenizer):
    """A tokenizer whose control token has a byte, and whose letter e has two."""

    def token_bytes(self):
        return super().token_bytes() + (np.arange(self.vocab_size) == ord("e"))


class EndsTexts(ByteTokenizer):
    """A tokenizer that puts the end behind every text, as those of some released models do."""

    def encode(self, text, *, inside=False, special=False):
        return [*super().encode(text), self.eos_id]


@pytest.mark.parametrize(
    ("tokenizer", "check"),
    [(LowerCase(), "round_trip"), (WrongSizes(), "token_bytes"), (EndsTexts(), "tokens_counted")],
)
def test_a_tokenizer_that_counts_wrongly_is_caught(subject, tokenizer, check):
    model = dataclasses.replace(subject.model, tokenizer=tokenizer)
    method = LibraryMethod(model, SETTINGS)
    finding = CHECKS[check](dataclasses.replace(subject, model=model, method=method))
    assert finding.verdict == "fail", finding


def test_every_check_has_a_trap():
    caught = {trap.check for trap in (*TRAPS, *AUTOREGRESSIVE)} | {"round_trip", "token_bytes"}
    assert caught == set(CHECKS)


STORIES = [
    "Once upon a time there was a girl named Lily. She liked to play in the park with her dog. One day it rained.",
    'Tom had a red ball. He threw it very high, and it fell into the river. His mom said, "Do not be sad, Tom! 🎈"',
    "The old cat slept in the sun all day. A little bird came and sang to it, and the cat opened one green eye.",
]


def figure(subject, method):
    """Return nats per token of the short targets, or of texts what a wrong count makes of a right figure of 1."""
    if type(method).score is not LibraryMethod.score:
        scores = method.score(subject.samples, exact=True)
        return sum(score.nats for score in scores) / sum(score.tokens for score in scores)
    right, wrong = subject.method.count(subject.texts), method.count(subject.texts)
    column = "n_bytes" if sum(x.n_bytes for x in right) != sum(x.n_bytes for x in wrong) else "tokens"
    return sum(getattr(x, column) for x in right) / sum(getattr(x, column) for x in wrong)


def caught_on(subject, traps):
    """Assert that the right method passes and that each trap is caught, and print the figures of docs/traps.md."""
    wrongs: dict[type, list[str]] = {}
    for trap in traps:
        wrongs.setdefault(trap.method, []).append(trap.check)
    for method, checks in wrongs.items():
        judged = with_method(subject, method, checks)
        findings = {name: CHECKS[name](judged) for name in checks}
        shown = ", ".join(f"{name} ({f.value:.3g} > {f.tolerance:.3g})" for name, f in findings.items())
        print(f"{method.__name__}: {figure(subject, judged.method):.4f}; {shown}")
        assert {finding.verdict for finding in findings.values()} == {"fail"}, findings
    assert "fail" not in {check(subject).verdict for check in CHECKS.values()}


@pytest.mark.slow
def test_the_table_of_the_shipped_models():
    """Every trap is caught on the trained models too; the table is that of docs/traps.md."""
    model = in_dtype(dlm.load(ROOT / "docs/results/models/tinystories"), "float32")
    subject = subject_of(model, STORIES, dlm.LikelihoodConfig())
    right = sum(orders.mean for orders in subject.orders) / sum(len(target) for _, target in subject.samples)
    print(f"\nright: {right:.4f} nats per token")
    caught_on(subject, TRAPS)
    twin = in_dtype(dlm.load(ROOT / "docs/results/models/tinystories_arm"), "float32")
    caught_on(autoregressive_subject(twin, STORIES), AUTOREGRESSIVE)
