"""Every trap is caught by the check that is named for it, which the right method passes."""

import dataclasses

import numpy as np
import pytest
from evaluation.museum.traps import TRAPS
from support.tiny_checkpoint import save

import diffusionlm as dlm
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.evaluation.certificate.checks import CHECKS
from diffusionlm.evaluation.certificate.method import LibraryMethod
from diffusionlm.evaluation.certificate.reference import Reference
from diffusionlm.evaluation.certificate.subject import Subject, choose_samples, repeated

SETTINGS = dlm.LikelihoodConfig(draws=4)
TEXTS = ["A first text, which is long enough.", "The second one h\u00e9re is a little longer than that.", "And " * 18]


def subject_of(model, texts, settings=SETTINGS):
    documents, _ = model.encode_documents(texts)
    samples, reference = choose_samples(model, documents, 3), Reference(model)
    method = LibraryMethod(model, settings)
    return Subject(model, method, reference, texts, samples, reference.costs(samples), repeated(method, samples))


def with_method(subject, trap):
    method = trap(subject.model, subject.method.settings)
    return dataclasses.replace(subject, method=method, estimates=repeated(method, subject.samples))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return subject_of(dlm.load(save(tmp_path_factory.mktemp("traps") / "mdm")), TEXTS)


@pytest.mark.parametrize("name", CHECKS)
def test_the_right_method_passes(subject, name):
    finding = CHECKS[name](subject)
    assert finding.verdict == "pass", finding


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: f"{trap.name}-{trap.check}")
def test_a_trap_is_caught(subject, trap):
    finding = CHECKS[trap.check](with_method(subject, trap.method))
    assert finding.verdict == "fail", finding


class LowerCase(ByteTokenizer):
    """A tokenizer that loses something of every text with capitals."""

    def encode(self, text, *, inside=False, special=False):
        return super().encode(text.lower())


class WrongSizes(ByteTokenizer):
    """A tokenizer whose control token has a byte, and whose letter e has two."""

    def token_bytes(self):
        return super().token_bytes() + (np.arange(self.vocab_size) == ord("e"))


@pytest.mark.parametrize(("tokenizer", "check"), [(LowerCase(), "round_trip"), (WrongSizes(), "token_bytes")])
def test_a_tokenizer_that_counts_wrongly_is_caught(subject, tokenizer, check):
    model = dataclasses.replace(subject.model, tokenizer=tokenizer)
    finding = CHECKS[check](dataclasses.replace(subject, model=model))
    assert finding.verdict == "fail", finding


def test_every_check_has_a_trap():
    caught = {trap.check for trap in TRAPS} | {"round_trip", "token_bytes"}
    assert caught == set(CHECKS)
