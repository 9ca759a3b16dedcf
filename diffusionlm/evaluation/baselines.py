"""Baselines of a language model: n-gram models and general-purpose compressors on the same held-out text.

The comparison is between code lengths. A model that gives the scored tokens of a record the probability p can store
them in -log p nats, whichever order it predicts them in, so the totals of an n-gram model (left to right), of an
autoregressive model (left to right) and of a masked diffusion model (any order; its bound is an upper bound on -log p)
can be set side by side. What cannot be compared is single tokens: a masked diffusion model predicts one token with
context on both sides and another with hardly any, an n-gram model always with the few tokens before it. This
module needs only NumPy.
"""

import bz2
import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from diffusionlm.errors import UserError

NGRAM_ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3, "5-gram": 5}
XZ_MAX_DICTIONARY = 1536 << 20  # bytes, the limit of the format


@dataclass(frozen=True)
class Discounted:
    """The counts of one n-gram length after absolute discounting; C contexts, E distinct n-grams."""

    count_E: np.ndarray  # count - discount, or 0 where the count is 0
    total_C: np.ndarray  # sum of the undiscounted counts of a context
    spare_C: np.ndarray  # the counts that discounting took from a context: the weight of the next shorter context


@dataclass(frozen=True)
class NGram:
    """A fitted n-gram model of every order up to `len(keys)`; index k holds the n-grams of k + 1 tokens.

    An n-gram's key is (index of its first n - 1 tokens in the table before) * vocab_size + (its last token); keys are
    sorted, and the position of a key is the n-gram's index.
    """

    vocab_size: int
    keys: tuple[np.ndarray, ...]
    raw: tuple[Discounted, ...]  # of the occurrences: for the longest n-grams of a model
    continuation: tuple[Discounted, ...]  # of the distinct tokens to the left: for the shorter ones; one entry fewer


def fit_ngram(records_MxW: np.ndarray, vocab_size: int, order: int) -> NGram:
    """Count all n-grams of up to `order` tokens that lie within one record; negative ids are gaps.

    Time and memory grow with M * W * order: about 1 s and 0.1 GB per million tokens at order 5.
    """
    index_MxW = np.zeros(records_MxW.shape, np.int64)  # of the n-gram that ends here, -1 for none; n = 0 has only one
    keys: list[np.ndarray] = []
    raw, continuation = [], []
    for n in range(1, order + 1):
        context_MxW = _previous(index_MxW, n)
        here_MxW = (context_MxW >= 0) & (records_MxW >= 0)
        if not here_MxW.any():
            raise UserError(f"{n}-grams need a training record of at least {n} tokens; use more text or longer records")
        key = context_MxW[here_MxW] * vocab_size + records_MxW[here_MxW]
        keys_E, inverse, count_E = np.unique(key, return_inverse=True, return_counts=True)
        if n > 1:
            suffix_E = np.empty(len(keys_E), np.int64)
            suffix_E[inverse] = index_MxW[here_MxW]
            left_extensions = np.bincount(suffix_E, minlength=len(keys[-1]))
            continuation.append(_discount(keys[-1] // vocab_size, left_extensions, len(raw[-1].total_C)))
        raw.append(_discount(keys_E // vocab_size, count_E, len(keys[-1]) if keys else 1))
        keys.append(keys_E)
        index_MxW = np.full_like(index_MxW, -1)
        index_MxW[here_MxW] = inverse
    return NGram(vocab_size, tuple(keys), tuple(raw), tuple(continuation))


def ngram_nats(model: NGram, records_NxL: np.ndarray) -> np.ndarray:
    """Return -log p of every token under the models of all orders, (orders, N, L) nats; values at gaps mean nothing.

    Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999):
        p_n(w | c) = (max(count(c, w) - D, 0) + spare(c) * p_{n-1}(w | c without its first token)) / total(c)
    down to p_0 = 1 / vocab_size; a context never seen hands over to the shorter one. The longest n-grams are counted by
    occurrences, the shorter ones by how many distinct tokens precede them. A token with fewer than n - 1 tokens before
    it in its record is scored by the model of the order that it has context for.
    """
    index_NxL = np.zeros(records_NxL.shape, np.int64)
    shorter_NxL = np.full(records_NxL.shape, 1 / model.vocab_size)  # p_{n-1}, of continuation counts
    scored_NxL = shorter_NxL
    nats = []
    for n, (keys_E, raw) in enumerate(zip(model.keys, model.raw, strict=True), start=1):
        context_NxL = _previous(index_NxL, n)
        key_NxL = context_NxL * model.vocab_size + records_NxL
        entry_NxL = np.minimum(np.searchsorted(keys_E, key_NxL), len(keys_E) - 1)
        known_NxL = (records_NxL >= 0) & (keys_E[entry_NxL] == key_NxL)  # a context of -1 makes a key below all others
        index_NxL = np.where(known_NxL, entry_NxL, -1)
        longest_NxL = _interpolate(raw, context_NxL, index_NxL, shorter_NxL)
        scored_NxL = np.where(np.arange(records_NxL.shape[1]) >= n - 1, longest_NxL, scored_NxL)
        nats.append(-np.log(scored_NxL))
        if n < len(model.keys):
            shorter_NxL = _interpolate(model.continuation[n - 1], context_NxL, index_NxL, shorter_NxL)
    return np.stack(nats)


def compressor_bits_per_byte(train: bytes, heldout: bytes) -> dict[str, float]:
    """Return the bits per held-out byte that xz and bz2 need for `heldout` once they have stored `train`.

    This is (size of train + heldout compressed together, minus size of train compressed) * 8 / len(heldout). xz runs
    with its strongest preset and a dictionary that spans everything, at 1 to 2 s per MB; bz2 sorts blocks of 900 kB, so
    only the last block of `train` can help it. Both remember what they stored of `heldout` so far, across records.
    """

    def xz(text: bytes) -> int:
        dictionary = min(max(len(text), 4096), XZ_MAX_DICTIONARY)
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
        return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))

    def bzip2(text: bytes) -> int:
        return len(bz2.compress(text))

    both = train + heldout
    with ThreadPoolExecutor() as pool:  # both libraries release the interpreter lock
        sizes = {name: (pool.submit(f, both), pool.submit(f, train)) for name, f in (("xz", xz), ("bz2", bzip2))}
    return {name: (a.result() - b.result()) * 8 / len(heldout) for name, (a, b) in sizes.items()}


def fit_and_score(
    train: np.ndarray, heldout_NxL: np.ndarray, token_bytes_V: np.ndarray, decode: Callable[[list[int]], str]
) -> dict[str, dict[str, float]]:
    """Fit every baseline on the training part and score held-out records: name -> nats_per_token, bits_per_byte.

    Tokens 1 to L - 1 of each record are scored, given the record's own earlier tokens, as the models' are:
    `heldout_NxL` holds exactly what a model is evaluated on. bits_per_byte is over the bytes of the scored tokens.
    The compressors work on the decoded text of whole records instead, one after the other: their rate is per byte of
    that text (control tokens decode to nothing), they keep what they learned from record to record, and their
    nats_per_token is that rate at the bytes per scored token.

    Args:
      train: token ids, (N,) as one stream or (records, tokens); negative ids are padding: not counted.
      heldout_NxL: token ids; negative ids are padding: not scored.
      token_bytes_V: bytes of text that each of the V token ids stands for, 0 for control tokens.
      decode: the tokenizer's ids -> text.

    Raises:
      UserError: a token id of V or more, no training record of 5 tokens, or no scored token that stands for text.
    """
    train_MxW = np.atleast_2d(train)
    train_tokens, heldout_tokens = train_MxW[train_MxW >= 0], heldout_NxL[heldout_NxL >= 0]
    target_NxS = heldout_NxL[:, 1:]
    scored_NxS = target_NxS >= 0
    _check(train_tokens, heldout_tokens, target_NxS[scored_NxS], token_bytes_V)
    bytes_per_token = token_bytes_V[target_NxS[scored_NxS]].mean()

    nats_per_token = {"uniform": np.log(len(token_bytes_V))}
    model = fit_ngram(train_MxW, len(token_bytes_V), max(NGRAM_ORDERS.values()))
    nats_OxNxL = ngram_nats(model, heldout_NxL)
    for name, order in NGRAM_ORDERS.items():
        nats_per_token[name] = nats_OxNxL[order - 1, :, 1:][scored_NxS].mean()
    texts = (decode(train_tokens.tolist()).encode(), decode(heldout_tokens.tolist()).encode())
    for name, bits_per_byte in compressor_bits_per_byte(*texts).items():
        nats_per_token[name] = bits_per_byte * np.log(2) * bytes_per_token
    return {
        name: {"nats_per_token": float(nats), "bits_per_byte": float(nats / np.log(2) / bytes_per_token)}
        for name, nats in nats_per_token.items()
    }


def _check(train: np.ndarray, heldout: np.ndarray, scored: np.ndarray, token_bytes_V: np.ndarray) -> None:
    for name, tokens in (("training", train), ("held-out", heldout)):
        if tokens.max(initial=0) >= len(token_bytes_V):
            raise UserError(
                f"{name} token id {tokens.max()} must lie below the vocabulary size {len(token_bytes_V)}; "
                "use the tokenizer of the data"
            )
    if not token_bytes_V[scored].any():
        raise UserError(f"none of the {scored.size} scored held-out tokens stands for text; hold out more text")


def _previous(index: np.ndarray, n: int) -> np.ndarray:
    """Return the index of the n - 1 tokens before each position, -1 if there are fewer; (records, tokens)."""
    edge = np.full_like(index[:, :1], 0 if n == 1 else -1)
    return np.concatenate([edge, index[:, :-1]], axis=1)


def _discount(context_E: np.ndarray, count_E: np.ndarray, contexts: int) -> Discounted:
    """Discount absolutely with D = n1 / (n1 + 2 n2), n_k the number of n-grams seen k times (Ney, Essen, Kneser 1994).

    Half an n-gram is added to both numbers, so that 0 < D < 1 also where nothing was seen once or twice and every token
    keeps a positive probability.
    """
    once, twice = np.sum(count_E == 1) + 0.5, np.sum(count_E == 2) + 0.5
    discount_E = (count_E > 0) * (once / (once + 2 * twice))
    total_C, spare_C = (np.bincount(context_E, weights, contexts) for weights in (count_E, discount_E))
    return Discounted(count_E - discount_E, total_C, spare_C)


def _interpolate(counts: Discounted, context: np.ndarray, index: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Return p of each token from its context's and n-gram's counts (index -1: never seen) and the shorter one's p."""
    total = np.where(context >= 0, counts.total_C[context], 0)
    count = np.where(index >= 0, counts.count_E[index], 0)
    return np.where(total > 0, (count + counts.spare_C[context] * shorter) / np.maximum(total, 1), shorter)
