"""Baselines: proper probabilities, closed forms, entropies of known sources, and a second implementation."""

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from diffusionlm.errors import UserError
from diffusionlm.evaluation.baselines import compressor_bits_per_byte, fit_and_score, fit_ngram, ngram_nats


def latin1(ids: list[int]) -> str:
    """A tokenizer's decode for which token i is byte i of the stored text, i < 128."""
    return bytes(ids).decode("latin-1")


def probabilities(train, vocab_size: int, order: int, records) -> np.ndarray:
    return np.exp(-ngram_nats(fit_ngram(np.array(train), vocab_size, order), np.array(records))[order - 1])


def kneser_ney(train, vocab_size: int, order: int, context: tuple[int, ...], token: int) -> float:
    """Interpolated Kneser-Ney straight from its definition, by recursion over dictionaries."""
    ngrams = [Counter(tuple(r[i : i + n]) for r in train for i in range(len(r) - n + 1)) for n in range(order + 1)]

    def p(n: int, context: tuple[int, ...]) -> float:
        if n == 0:
            return 1 / vocab_size
        table = ngrams[n] if n == order else Counter(longer[1:] for longer in ngrams[n + 1])
        once, twice = (sum(c == k for c in table.values()) + 0.5 for k in (1, 2))
        discount = once / (once + 2 * twice)
        followers = {gram[-1]: c for gram, c in table.items() if gram[:-1] == context}
        shorter = p(n - 1, context[1:])
        if not followers:
            return shorter
        taken = discount * len(followers)
        return (max(followers.get(token, 0) - discount, 0) + taken * shorter) / sum(followers.values())

    return p(order, context)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("context_length", [0, 1, 2, 3])
def test_probabilities_sum_to_one_after_every_context(order, context_length):
    vocab_size = 7
    p_train = [0.4, 0.3, 0.2, 0.05, 0.03, 0.02, 0.0]  # the last id never occurs
    train = np.random.default_rng(0).choice(vocab_size, size=(9, 12), p=p_train)
    contexts = list(itertools.product(range(vocab_size), repeat=context_length))
    records = [[*context, token] for context in contexts for token in range(vocab_size)]
    p = probabilities(train, vocab_size, order, records)[:, -1].reshape(len(contexts), vocab_size)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_agrees_with_kneser_ney_written_from_its_definition(order):
    rng = np.random.default_rng(order)
    train = np.minimum(*rng.integers(5, size=(2, 6, 9))).tolist()
    records = rng.integers(5, size=(40, 6)).tolist()
    p = probabilities(train, 5, order, records)
    for record, row in zip(records, p, strict=True):
        for position, token in enumerate(record):
            known = min(order, position + 1)  # tokens near the left edge are scored by the order that has its context
            context = tuple(record[position - known + 1 : position])
            np.testing.assert_allclose(row[position], kneser_ney(train, 5, known, context, token), rtol=1e-12)


def test_unigram_and_uniform_in_closed_form():
    token_bytes = np.array([2, 3, 1, 0])
    scores = fit_and_score(np.array([0, 0, 0, 1, 0]), np.array([[3, 0, 1, 2]]), token_bytes, latin1)
    discount = 1.5 / (1.5 + 2 * 0.5)  # one id was seen once, none twice, half added to each
    p = [(4 - discount + 2 * discount / 4) / 5, (1 - discount + 2 * discount / 4) / 5, 2 * discount / 4 / 5]
    nats = -np.log(p).sum()
    assert scores["unigram"]["nats_per_token"] == pytest.approx(nats / 3)  # the first token is context only
    assert scores["unigram"]["bits_per_byte"] == pytest.approx(nats / np.log(2) / 6)
    assert scores["uniform"]["nats_per_token"] == pytest.approx(np.log(4))
    assert scores["uniform"]["bits_per_byte"] == pytest.approx(3 * 2 / 6)


def test_first_token_is_context_for_the_second():
    train = np.array([0, 1] * 50 + [2, 3] * 50)
    after = {c: fit_and_score(train, np.array([[c, 1]]), np.ones(4, int), latin1) for c in (0, 2)}
    assert after[0]["bigram"]["nats_per_token"] < 0.05 < 3 < after[2]["bigram"]["nats_per_token"]
    assert after[0]["unigram"] == after[2]["unigram"]


def test_independent_source_reaches_its_entropy():
    rng = np.random.default_rng(1)
    p = np.array([0.35, 0.25, 0.2, 0.1, 0.06, 0.04])
    train, heldout = rng.choice(6, size=300_000, p=p), rng.choice(6, size=(400, 101), p=p)
    scores = fit_and_score(train, heldout, np.ones(6, int), latin1)
    optimum = -np.log(p[heldout[:, 1:]]).mean()  # what the source itself would need for these very tokens
    assert optimum == pytest.approx(-(p * np.log(p)).sum(), abs=0.02)
    for name, tolerance in (("unigram", 2e-4), ("bigram", 1e-3), ("trigram", 3e-3)):
        assert scores[name]["nats_per_token"] == pytest.approx(optimum, abs=tolerance)
    for name in ("xz", "bz2"):  # no code beats the entropy, and these stay within a fifth of it
        assert 0.98 * optimum < scores[name]["nats_per_token"] < 1.2 * optimum


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "name", "worse"),
    [pytest.param(1, "bigram", "unigram", marks=pytest.mark.slow), (2, "trigram", "bigram")],
)
def test_markov_source_reaches_its_entropy_rate_at_its_own_order(memory, name, worse):
    rng = np.random.default_rng(2)
    vocab_size = 4
    next_p = rng.dirichlet(np.full(vocab_size, 0.3), size=(vocab_size,) * memory) * 0.95 + 0.05 / vocab_size
    uniform = rng.random(300_000)
    stream = [0] * memory
    cumulative = next_p.cumsum(-1)
    for u in uniform:
        stream.append(int(np.searchsorted(cumulative[tuple(stream[-memory:])], u * 0.999999)))
    train, heldout = np.array(stream[:260_000]), np.array(stream[260_000:300_000]).reshape(-1, 100)
    scores = fit_and_score(train, heldout, np.ones(vocab_size, int), latin1)
    contexts = tuple(heldout[:, k : k - memory or None] for k in range(memory))
    rate = -np.log(next_p[(*contexts, heldout[:, memory:])]).mean()
    assert scores[name]["nats_per_token"] == pytest.approx(rate, abs=0.01)
    assert scores[worse]["nats_per_token"] > rate + 0.05


def test_ngrams_cross_neither_records_nor_padding():
    apart = np.array([[0, 1], [2, 3]])
    padded = np.array([[0, 1, -1, 2, 3, -1, -1]])
    together = np.array([[0, 1, 2, 3]])
    queries = np.array([[1, 2]])
    separate, gaps, joined = (ngram_nats(fit_ngram(train, 4, 2), queries)[1] for train in (apart, padded, together))
    np.testing.assert_array_equal(separate, gaps)
    assert joined[0, 1] < separate[0, 1] - 0.5


def test_what_stands_before_padding_is_no_context():
    model = fit_ngram(np.random.default_rng(6).integers(4, size=(1, 500)), 4, 3)
    records = np.array([[c, -1, w] for w in range(4) for c in range(4)])
    p_4x4 = np.exp(-ngram_nats(model, records)[2, :, 2]).reshape(4, 4)  # of w, after c and a gap
    np.testing.assert_array_equal(p_4x4, np.tile(p_4x4[:, :1], 4))
    np.testing.assert_allclose(p_4x4.sum(axis=0), 1)


def test_padding_is_not_scored():
    rng = np.random.default_rng(3)
    train, heldout = rng.integers(4, size=200), rng.integers(4, size=(1, 20))
    padded = np.pad(heldout, ((0, 0), (0, 5)), constant_values=-1)
    scores = [fit_and_score(train, h, np.ones(4, int), latin1) for h in (heldout, padded)]
    assert scores[0] == scores[1]


def test_compressors_need_next_to_nothing_for_repetition_and_eight_bits_for_noise():
    rng = np.random.default_rng(4)
    train = 50 * rng.bytes(2000)
    repeated = compressor_bits_per_byte(train, train[:20_000])
    noise = compressor_bits_per_byte(rng.bytes(100_000), rng.bytes(20_000))
    for name in ("xz", "bz2"):
        assert repeated[name] < 0.1
        assert noise[name] == pytest.approx(8, rel=0.02)


@pytest.mark.slow
def test_xz_remembers_the_far_end_of_the_training_text():
    train = np.random.default_rng(5).bytes(2_000_000)
    assert compressor_bits_per_byte(train, train[:20_000])["xz"] < 0.1


@pytest.mark.parametrize(
    ("train", "heldout", "token_bytes", "message"),
    [
        ([], [[0, 1]], [1, 1], "1-grams need a training record of at least 1 tokens"),
        ([[0, 1, 0, 1]] * 9, [[0, 1]], [1, 1], "5-grams need a training record of at least 5 tokens"),
        ([0, 1], [[-1, -1]], [1, 1], "none of the 0 scored"),
        ([0, 5], [[0, 1]], [1, 1], "training token id 5 .* vocabulary size 2"),
        ([0, 1], [[0, 2]], [1, 1], "held-out token id 2 .* vocabulary size 2"),
        ([0, 1], [[1], [1]], [1, 1], "none of the 0 scored"),
        ([0, 1], [[1, 0]], [0, 1], "none of the 1 scored"),
    ],
)
def test_unusable_input_is_told_in_one_line(train, heldout, token_bytes, message):
    with pytest.raises(UserError, match=message) as error:
        fit_and_score(np.array(train, int), np.array(heldout), np.array(token_bytes), latin1)
    assert "\n" not in str(error.value)


def test_imports_no_jax():
    modules = "diffusionlm.evaluation.baselines, diffusionlm.evaluation.comparisons"
    command = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)
