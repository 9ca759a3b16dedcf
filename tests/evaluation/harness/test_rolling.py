"""Likelihoods of whole texts, as the harness divides them by all bytes: no token of a text is free."""

import dataclasses
import math

import jax.numpy as jnp
import pytest
from support.tiny_checkpoint import random_params, save

import diffusionlm as dlm
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.evaluation.harness.options import parse
from diffusionlm.evaluation.harness.requests import Document, Request
from diffusionlm.evaluation.harness.scoring import score_documents
from diffusionlm.evaluation.session import Session
from diffusionlm.likelihood.monte_carlo import estimate

EOS = ByteTokenizer.eos_id
KINDS = [("mdm", False), ("mdm", True), ("arm", True)]  # the objective, and whether tokens are predicted a place before
WITHOUT = {"start_id": None}
EXACT = {"mdm": {"estimator": "any_order", "rows": 16}, "arm": {}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints by objective and whether every token has the same probability."""
    directory, flat = tmp_path_factory.mktemp("rolling"), {"head": jnp.zeros_like(random_params()["head"])}
    changes = {True: flat, False: {}}
    return {
        (objective, uniform): dlm.load(save(directory / f"{objective}{uniform}", objective, **changes[uniform]))
        for objective in ("mdm", "arm")
        for uniform in changes
    }


def changed(model, shifted, canvas, **changes):
    config = dataclasses.replace(model.config, shifted=shifted, **changes)
    return dataclasses.replace(model, config=config, sidecar=dataclasses.replace(model.sidecar, canvas=canvas))


def rolled(model, texts, **options):
    requests = [Request(Document("t", i), "", text) for i, text in enumerate(texts)]
    return [score.estimate.log_likelihood for score in score_documents(Session(model), parse(options), requests)]


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [{}, WITHOUT], ids=["start", "none"])
@pytest.mark.parametrize(("objective", "shifted"), KINDS)
def test_every_byte_of_a_uniform_model_costs_the_same(objective, shifted, canvas, models):
    """Also in a text of several windows: bits per byte are log2 of the vocabulary, whatever begins a text."""
    texts = ["a", "b\u00e9c", "long " * 24]
    scores = rolled(changed(models[objective, True], shifted, canvas), texts, draws=2, rows=16)
    assert scores == pytest.approx([-len(text.encode()) * math.log(257) for text in texts], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "shifted"), KINDS)
def test_without_a_start_token_the_first_token_is_scored_too(objective, shifted, models):
    """From nothing, or behind EOS where something must stand before it, as the harness' own models do."""
    model = changed(models[objective, False], shifted, WITHOUT)
    pair = ([EOS] if shifted else [], [*b"abc"])
    settings = dlm.LikelihoodConfig(**EXACT[objective])
    with model.on_mesh():
        (expected,) = estimate(model.params, model.config, [pair], settings)
    assert rolled(model, ["abc"], **EXACT[objective]) == pytest.approx([expected.log_likelihood], rel=1e-5)


def test_texts_without_anything_to_score_are_named(models):
    model = changed(models["mdm", False], True, WITHOUT, eos_ids=())
    with pytest.raises(UserError, match="task t, document 0: nothing predicts the first token of a text"):
        rolled(model, ["abc"])
    for shifted in (False, True):
        with pytest.raises(UserError, match="task t, document 1: the text '' has no token to score"):
            rolled(changed(models["mdm", False], shifted, WITHOUT), ["a", ""])
