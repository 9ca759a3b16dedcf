"""Texts in chunks: what is encoded chunk by chunk has the ids that the libraries give to the whole text."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as library
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.texts import DOCUMENTS

from diffusionlm.data import tokenizers
from diffusionlm.data.tokenizers import chunks

END = "<|endoftext|>"
# Published expressions; LLaMA 3's is in its tokenizer.json, Qwen2's in that of Qwen2.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
    r"\s+"
)
WORDS = ["the", "a", "s", "S", "dog", "don't", "it's", "1", "2024", "x9", "9x", *"\u00e9\u017f\u4f60\u0338", "e\u0301"]
SIGNS = ["'", "'s", "<", "=", ".", ",", '"', "--", "_", "\u2581", "\u2019", "\u00a0", "\u3000", "\x7f", "\x1c", END]
SPACES = [" ", " ", " ", "  ", "   ", "\n", "\r\n", "\t", " \n", "\n "]
TEXT = st.lists(st.sampled_from([*WORDS, *SIGNS, *SPACES]), max_size=14).map("".join)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def train(expression=None, normalizer=None):
    """Return a tokenizer of bytes that was trained on texts in which signs and spaces stand next to letters."""
    tokenizer = library.Tokenizer(library.models.BPE())
    steps = library.pre_tokenizers
    if expression is None:
        tokenizer.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
    else:
        cut = steps.Split(library.Regex(expression), "isolated")
        tokenizer.pre_tokenizer = steps.Sequence([cut, steps.ByteLevel(add_prefix_space=False, use_regex=False)])
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=steps.ByteLevel.alphabet(), special_tokens=[END], show_progress=False
    )
    joined = ["".join(a + b for a in WORDS + SPACES) for b in [*SIGNS[:-1], *SPACES, *WORDS]]
    tokenizer.train_from_iterator([*DOCUMENTS, *joined], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def byte_levels(tmp_path_factory):
    """Pairs of our tokenizer and the library's, by the way of cutting words."""
    pairs = {}
    for name, tokenizer in {
        "gpt2": train(),
        "qwen2": train(QWEN2, library.normalizers.NFC()),
        "llama3": train(LLAMA3),
    }.items():
        pairs[name] = (load(tokenizer, tmp_path_factory.mktemp(name)), tokenizer)
        tokenizer.encode_special_tokens = True
    return pairs


def load(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return tokenizers.load(str(folder))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama3"])
@MANY
@given(text=TEXT)
@example(text="the dog's a <\u0338 it's")
@example(text="don't'sup  the\n\n the \tdog ")
def test_ids_of_bytes_are_those_of_the_whole_text(byte_levels, name, text):
    ours, whole = byte_levels[name]
    assert chunks.ends_at_words(ours._definition())
    assert ours.encode(text) == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": [{"id": 0, "content": "the d", "special": False}]},
        {"model": {"type": "BPE", "dropout": 0.1}},
        {"model": {"type": "WordPiece"}},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"pre_tokenizer": None},
    ],
)
def test_other_definitions_are_encoded_as_a_whole(change):
    definition = {
        "added_tokens": [{"id": 0, "content": END, "special": True}],
        "model": {"type": "BPE", "dropout": None},
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    }
    assert chunks.ends_at_words(definition) and not chunks.ends_at_words(definition | change)


@pytest.fixture(scope="module")
def pieces():
    """Pairs of our tokenizer and the library's, of models of pairs; of the last three, pieces go on after spaces."""

    def trained(**options):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*DOCUMENTS, *(f"the dog, it's a{sign} dog" for sign in SIGNS)]),
            model_writer=model,
            **{"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "minloglevel": 2},
            normalization_rule_name="identity",
            **{"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True} | options,
        )
        return model.getvalue()

    models = {
        "plain": trained(add_dummy_prefix=False),
        "prefixed": trained(),
        "crossing": trained(split_by_whitespace=False),
        "suffixes": trained(treat_whitespace_as_suffix=True),
        "defined": trained(user_defined_symbols=["the d"]),
    }
    return {
        name: (tokenizers.SentencePieceTokenizer(model), sentencepiece.SentencePieceProcessor(model_proto=model))
        for name, model in models.items()
    }


@pytest.mark.parametrize("name", ["plain", "prefixed", "crossing", "suffixes", "defined"])
@MANY
@given(text=TEXT.map(lambda text: text.replace("\u2581", "")))
@example(text="the dog, a  dog")
@example(text=" the dog")
def test_ids_of_pieces_are_those_of_the_whole_text(pieces, name, text):
    ours, whole = pieces[name]
    assert ours.encode(text) == whole.encode(text)


def test_only_models_without_pieces_across_spaces_are_encoded_in_chunks(pieces):
    assert {name for name, (ours, _) in pieces.items() if ours._ends_at_spaces} == {"plain", "prefixed"}


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(chunks, "MOST_KEPT", 10)
    encoder = chunks.Chunks(chunks.AT_SPACES, lambda chunk: [*chunk.encode()])
    for start in range(0, 100, 7):
        text = " ".join(f"w{i}" for i in range(start, start + 7)) + " " + "x" * 50
        assert bytes(encoder.encode(text)).decode() == text
        assert len(encoder._kept) <= 10 and all(len(chunk) < 50 for chunk in encoder._kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "mistral-v1"])
@pytest.mark.parametrize("corpus", ["books", "openstax", "tinystories", "web_samples"])
def test_ids_of_real_text_are_those_of_the_libraries(data_dir, name, corpus):
    ours = tokenizers.load_directory(f"{data_dir}/tokenizers/{name}")
    (path, *_) = sorted(Path(data_dir, corpus).glob("*.jsonl"), key=lambda path: path.stat().st_size)
    whole = ours._model.encode if name == "mistral-v1" else lambda text: ours._library.encode(text).ids
    for line in path.read_text().splitlines()[:300]:
        text = json.loads(line).get("text", line)[:100_000]
        assert ours.encode(text) == whole(text)
