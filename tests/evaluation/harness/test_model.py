"""The model class in lm-evaluation-harness: its scores are those of our own API, and depend on nothing else."""

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
from support.tiny_checkpoint import save

pytest.importorskip("lm_eval", reason="needs the package lm_eval (extra eval)")

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import get_model

import diffusionlm as dlm
from diffusionlm.data.chat_templates import TURNS, Template
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.evaluation.harness import scoring
from diffusionlm.evaluation.harness.model import DiffusionLM, Estimated, cut
from diffusionlm.evaluation.harness.plugin import mc_stderr, single_choice
from diffusionlm.evaluation.harness.requests import Dialogue, encode_prompt, key_of
from diffusionlm.likelihood.confidence import confidences
from diffusionlm.likelihood.monte_carlo import estimate
from diffusionlm.sampling.generate import generate

FEW = {"draws": 2, "rows": 16}
PAIRS = [("It is one o", "clock"), ("a", " bcde"), ("", "start"), ("Some text.\n", "more")]  # of one shape


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    directory = tmp_path_factory.mktemp("harness")
    return {name: save(directory / name, name) for name in ("mdm", "arm")}


@pytest.fixture(scope="module")
def mdm(places):
    return dlm.load(places["mdm"])


def instances(kind, arguments, task="t"):
    made = []
    for i, args in enumerate(arguments):
        made.append(Instance(kind, {}, args, 0, metadata=(task, i, 1)))
    return made


def choices(context, continuations, number=0):
    pairs = [(context, text) for text in continuations]
    return [Instance("loglikelihood", {}, pair, i, metadata=("t", number, 1)) for i, pair in enumerate(pairs)]


def values(responses):
    return [float(value) for value, _ in responses]


def test_the_harness_knows_the_class(places):
    assert get_model("diffusionlm") is DiffusionLM and issubclass(DiffusionLM, LM)
    model = DiffusionLM.create_from_arg_string(
        f"pretrained={places['mdm']},draws=2,guidance=0.5", {"batch_size": 1, "device": "cuda:0"}
    )
    assert (model.rank, model.world_size) == (0, 1)
    assert model.options.likelihood.draws == 2 and model.options.sampling.guidance == 0.5
    assert model.options.batch_size == 1


def test_log_likelihoods_are_those_of_the_api(mdm):
    """Compare with our own call, given the noise of the request's content."""
    model = DiffusionLM(mdm, **FEW)
    responses = model.loglikelihood(instances("loglikelihood", PAIRS))
    keys = [key_of("score", *pair) for pair in PAIRS]
    settings = dlm.LikelihoodConfig(**FEW)
    with mdm.on_mesh():
        expected = estimate(mdm.params, mdm.config, mdm.encode_pairs(PAIRS), settings, request_ids=keys)
    np.testing.assert_allclose(values(responses), [e.log_likelihood for e in expected], rtol=1e-5)
    np.testing.assert_allclose([v.estimate.stderr for v, _ in responses], [e.stderr for e in expected], rtol=1e-4)
    assert [greedy for _, greedy in responses] == mdm.is_greedy(PAIRS)
    assert model.forwards >= sum(e.nfe for e in expected)


def test_an_exact_model_is_exact(places):
    arm = dlm.load(places["arm"])
    responses = DiffusionLM(arm).loglikelihood(instances("loglikelihood", PAIRS))
    assert values(responses) == pytest.approx([e.log_likelihood for e in arm.log_likelihood(PAIRS)], rel=1e-5)


@pytest.mark.parametrize("rows, batch_size", [(32, 32), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_scores_depend_on_the_request_alone(rows, batch_size, mdm):
    """Not on other requests, their order, their number, the size of batches, or the task."""
    alone = values(DiffusionLM(mdm, **FEW).loglikelihood(instances("loglikelihood", PAIRS[:1])))
    long = [("x" * 70, " yzyz")]  # its batch is padded to another length
    among = instances("loglikelihood", [*PAIRS[1:], *long, PAIRS[0]], task="other")
    model = DiffusionLM(mdm, batch_size=batch_size, draws=2, rows=rows)
    assert values(model.loglikelihood(among))[-1:] == pytest.approx(alone, abs=1e-4)


def test_equal_requests_have_equal_scores_whatever_their_document(mdm):
    """So an answer from the harness' cache, which is found by the texts, is the one that would be computed."""
    first, second = DiffusionLM(mdm, **FEW).loglikelihood(instances("loglikelihood", [PAIRS[0], PAIRS[0]]))
    assert float(first[0]) == float(second[0]) and first[0].estimate == second[0].estimate


class Rules(TemplateLM):
    """The harness' own rules of how a context and its continuation are split, with our tokenizer."""

    prefix_token_id = eot_token_id = 256

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.model.encode(string) if add_special_tokens is not False else self.model.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.seen = [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


@pytest.mark.parametrize(
    "pair",
    [
        ("a b", " c"),
        ("a b ", "c"),
        ("a b  \n", " c"),
        ("a\n\n", "b"),
        ("", "abc"),
        ("   ", "abc"),
        ("é", "ü"),
        ("a", " "),
    ],
)
def test_contexts_and_continuations_are_split_as_in_the_harness(pair, mdm):
    rules = Rules(mdm)
    rules.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)
    assert mdm.encode_pairs([pair]) == rules.seen


def test_a_long_context_loses_its_start_and_is_counted(mdm):
    """The model sees 96 tokens: of the context, those before the continuation."""
    model = DiffusionLM(mdm, **FEW)
    short, long = ("y" * 80, "final"), ("x" * 40 + "y" * 80 + "z" * 11, "final")
    responses = model.loglikelihood(instances("loglikelihood", [short, long]))
    assert model.truncated == 1 and math.isfinite(responses[1][0])
    kept = mdm.encode_pairs([long])[0][0][-91:]
    with mdm.on_mesh():
        settings = dlm.LikelihoodConfig(**FEW)
        (expected,) = estimate(
            mdm.params, mdm.config, [(kept, list(b"final"))], settings, request_ids=[key_of("score", *long)]
        )
    assert float(responses[1][0]) == pytest.approx(expected.log_likelihood, rel=1e-5)
    assert model.get_model_info()["truncated"] == 1


@pytest.mark.parametrize(
    "pair, message",
    [
        (("a", ""), "task t, document 0: the continuation '' adds no token"),
        (("a", "b" * 97), "task t, document 0: the continuation has 97 tokens, and the model's context 96"),
    ],
)
def test_what_cannot_be_scored_names_its_document(pair, message, mdm):
    with pytest.raises(UserError, match=message):
        DiffusionLM(mdm, **FEW).loglikelihood(instances("loglikelihood", [pair]))


def test_greedy_decoding_is_compared_only_where_it_is_asked_for(mdm, monkeypatch):
    compared = []

    def remembers(params, cfg, pairs, settings):
        compared.append(len(pairs))
        return [True] * len(pairs)

    monkeypatch.setattr(scoring, "is_greedy", remembers)
    asked = [*choices("a", [" bcde", " cdef"]), *instances("loglikelihood", [("x", " yzyz")], task="word")]
    for arguments, expected in [({}, [False, False, True]), ({"greedy": "always"}, [True] * 3)]:
        model = DiffusionLM(mdm, **FEW, **arguments)
        assert [greedy for _, greedy in model.loglikelihood(asked)] == expected
    assert not any(greedy for _, greedy in DiffusionLM(mdm, **FEW, greedy="never").loglikelihood(asked))
    known = DiffusionLM(mdm, **FEW, greedy_tasks=frozenset({"t"}))
    assert [greedy for _, greedy in known.loglikelihood(asked)] == [True, True, False]


def test_rolling_likelihoods_are_those_of_perplexity(mdm):
    texts = ["a short text", "long " * 24]
    model = DiffusionLM(mdm, **FEW)
    rolled = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    again = DiffusionLM(mdm, **FEW).loglikelihood_rolling(instances("loglikelihood_rolling", [(texts[1],)]))
    assert float(again[0]) == pytest.approx(float(rolled[1]), rel=1e-5)
    direct = mdm.perplexity(texts, dlm.LikelihoodConfig(passes=16, **FEW))
    for value, document in zip(rolled, direct.documents, strict=True):
        spread = math.hypot(value.estimate.stderr, document.stderr)
        assert abs(value - document.log_likelihood) < 5 * spread


@pytest.mark.parametrize("batch_size", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_answers_are_those_of_generate(batch_size, mdm):
    prompts = [("abc", {"until": ["\n"], "max_gen_toks": 8}), ("a longer prompt", {"until": [], "max_gen_toks": 8})]
    model = DiffusionLM(mdm, batch_size=batch_size, strategy="low_confidence")
    texts = model.generate_until(instances("generate_until", prompts))
    sampling = dlm.SamplingConfig(length=8, temperature=0.0, strategy="low_confidence")
    with mdm.on_mesh():
        ids = [mdm.encode(text) for text, _ in prompts]
        direct = generate(mdm.params, mdm.config, ids, sampling)
    written = [mdm.decode_after(i, t) for i, t in zip(ids, direct.tokens.tolist(), strict=True)]
    assert texts == [written[0].split("\n")[0], written[1]]


def test_samples_differ_between_repeats_and_not_between_runs(mdm):
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    (request,) = instances("generate_until", [("ab", drawn)])
    first, second = DiffusionLM(mdm, eos_penalty=float("inf")).generate_until([request, request])
    assert first != second
    assert DiffusionLM(mdm, eos_penalty=float("inf")).generate_until([request, request]) == [first, second]


def test_a_text_ends_before_the_first_stop():
    assert cut("a b c", ["c", "b"]) == "a " and cut("abc", ["x"]) == "abc" and cut("abc", []) == "abc"


def test_no_room_for_a_prompt_is_one_line(mdm):
    asked = instances("generate_until", [("ab", {"until": [], "max_gen_toks": 96})])
    with pytest.raises(UserError, match="max_gen_toks=96 leaves no room for a prompt in the model's context of 96"):
        DiffusionLM(mdm).generate_until(asked)
    pair, truncated = encode_prompt(mdm, "x" * 20 + "y" * 88, 8)
    assert truncated and pair[0] == list(b"y" * 88)


@pytest.fixture(scope="module")
def chat(mdm):
    """The model, with a chat template."""
    template = Template("plain", TURNS["plain"], ByteTokenizer.eos_id).to_dict()
    return dataclasses.replace(mdm, sidecar=dataclasses.replace(mdm.sidecar, template=template))


def test_messages_are_read_as_the_template_writes_them(chat, mdm):
    model = DiffusionLM(chat, **FEW)
    messages = [{"role": "user", "content": "Hi"}]
    dialogue = model.apply_chat_template(messages)
    assert list(dialogue.ids) == chat.encode_messages(messages)
    assert dialogue == "### user\nHi\n\n### assistant\n"
    begun = model.apply_chat_template([*messages, {"role": "assistant", "content": "I"}], add_generation_prompt=False)
    assert begun.ids == (*dialogue.ids, ord("I")) and begun == dialogue + "I"
    responses = model.loglikelihood(instances("loglikelihood", [(dialogue, " bcde")]))
    with chat.on_mesh():
        pairs, keys = [(dialogue.ids, list(b" bcde"))], [key_of("score", dialogue, " bcde")]
        (expected,) = estimate(chat.params, chat.config, pairs, dlm.LikelihoodConfig(**FEW), request_ids=keys)
    assert values(responses) == pytest.approx([expected.log_likelihood], rel=1e-5)
    plain = DiffusionLM(mdm, **FEW)
    assert json.loads(model.chat_template(True))["turn"] == TURNS["plain"] and model.chat_template(False) is None
    assert model.tokenizer_name != plain.tokenizer_name == DiffusionLM(mdm, draws=1).tokenizer_name


def test_a_template_that_is_not_there_is_one_line(chat, mdm):
    with pytest.raises(UserError, match="needs a chat template, and this model has none"):
        DiffusionLM(mdm).chat_template(True)
    with pytest.raises(UserError, match="apply_chat_template=other names a template"):
        DiffusionLM(chat).chat_template("other")


def test_a_long_dialogue_is_answered(chat):
    dialogue = DiffusionLM(chat).apply_chat_template([{"role": "user", "content": "x" * 100}])
    pair, truncated = encode_prompt(chat, dialogue, 8)
    assert truncated and pair[0] == list(dialogue.ids[-88:])


@pytest.mark.slow
def test_eight_devices_give_the_same_scores(places):
    scores = []
    for devices in (1, 8):
        model = DiffusionLM(places["mdm"], **FEW, devices=devices)
        assert len(model.model.mesh.devices.flat) == devices
        scores.append(values(model.loglikelihood(instances("loglikelihood", PAIRS))))
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    with pytest.raises(UserError, match="devices=9, and this machine has 8"):
        DiffusionLM(places["mdm"], devices=9)


def test_choices_stop_once_the_best_is_clear(mdm, monkeypatch):
    """The nats of passes are known: one choice is far ahead, or two are equal and take the most passes."""
    from diffusionlm.likelihood.monte_carlo import Scorer

    levels = {"clear": [1.0, 9.0, 9.0], "close": [5.0, 5.0, 9.0]}
    rng = np.random.default_rng(0)

    def passes(level):
        def run_passes(self, indices, numbers):
            for r in indices:
                self._nats[r] += (level[r] + rng.normal(0, 0.5, len(numbers))).tolist()

        return run_passes

    for name, expected in [("clear", {8}), ("close", {8, 32})]:
        monkeypatch.setattr(Scorer, "run_passes", passes(levels[name]))
        model = DiffusionLM(mdm, **FEW, sequential=True, max_passes=32)
        responses = model.loglikelihood(choices("a", ["bb", "cc", "dd"]))
        assert {value.estimate.passes for value, _ in responses} == expected
    assert responses[2][0].estimate.passes == 8  # dropped at the first look


def test_confidences_are_log_probabilities_of_one_pass(mdm):
    from support.tiny_likelihood import MASK, MDM, PREFIX, log_probabilities, params_of

    target = [9, 2, 6]
    log_p = log_probabilities(MDM, [PREFIX + [MASK] * 3])[0, len(PREFIX) :]
    expected = sum(log_p[i, token] for i, token in enumerate(target))
    assert confidences(params_of(MDM), MDM, [(PREFIX, target)]) == pytest.approx([expected], rel=1e-4)
    one = dlm.LikelihoodConfig(estimator="chain_rule")
    pair = ("a", "b")
    responses = DiffusionLM(mdm, scoring="confidence").loglikelihood(instances("loglikelihood", [pair]))
    assert values(responses) == pytest.approx([mdm.log_likelihood([pair], one)[0].log_likelihood], rel=1e-4)


def test_the_error_of_an_accuracy_is_its_spread_over_seeds(mdm):
    """24 documents of a random model: each seed gives another accuracy, with the spread that one of them predicts."""
    n, seeds = 24, 16
    asked = [request for i in range(n) for request in choices(f"n {i}", [" abcd", " bcde"], i)]
    accuracies, predicted = [], []
    for seed in range(seeds):
        responses = DiffusionLM(mdm, **FEW, seed=seed).loglikelihood(asked)
        figures = [single_choice({"gold": i % 2}, responses[2 * i : 2 * i + 2]) for i in range(n)]
        accuracies.append(np.mean([figure["acc"] for figure in figures]))
        predicted.append(mc_stderr([figure["mc_stderr_of_acc"] for figure in figures]))
    # The spread over 16 seeds is known to 18%, and the prediction is too small by up to 18% where choices are equal.
    assert np.std(accuracies, ddof=1) == pytest.approx(np.mean(predicted), rel=0.5) and min(predicted) > 0


def test_numbers_with_estimates_survive_a_cache(mdm):
    ((value, _),) = DiffusionLM(mdm, **FEW).loglikelihood(instances("loglikelihood", PAIRS[:1]))
    again = pickle.loads(pickle.dumps(value))
    assert isinstance(again, Estimated) and again == value and again.estimate == value.estimate
    dialogue = pickle.loads(pickle.dumps(Dialogue("text", [1, 2])))
    assert dialogue == "text" and dialogue.ids == (1, 2)
