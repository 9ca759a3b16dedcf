"""Parts of texts: what is given inside a text comes back as it was given, from every kind of tokenizer."""

import io
import json

import pytest
import sentencepiece
import tokenizers as library
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.texts import DOCUMENTS
from support.tokenizer_files import CALL, END, MASK, write_byte_level, write_metaspace

from diffusionlm.data import tokenizers

KINDS = ["byte", "trained", "llama", "t5", "byte_level", "spaced_byte_level", "llama_json", "metaspace", "legacy"]
PREFIXED = ["llama", "t5", "spaced_byte_level", "llama_json", "metaspace", "legacy"]
REAL = ["gpt2", "qwen2", "maxtext-default", "mistral-v1"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
SLOW_FIXTURES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def like_t5():
    """Unigrams with bytes, a space before every text, and runs of spaces taken for one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS),
        model_writer=model,
        model_type="unigram",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def rewrite(directory, **parts):
    """Change parts of a tokenizer.json."""
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


@pytest.fixture(scope="module")
def small(tmp_path_factory, trained, models):
    """A small tokenizer of every kind, by name."""

    def path(name):
        return tmp_path_factory.mktemp(name)

    directories = {
        "byte_level": write_byte_level(path("a")),
        "llama_json": write_metaspace(path("b"), models["prefixed"]),
    }
    spaced = write_byte_level(path("c"))
    rewrite(
        spaced, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    )
    mark = {"type": "Metaspace", "replacement": "\u2581"}
    fallback = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    for name, scheme in (
        ("metaspace", {"prepend_scheme": "first", "split": False}),
        ("legacy", {"add_prefix_space": True}),
    ):
        directories[name] = write_metaspace(path(name), models["metaspace"])
        step = mark | scheme
        back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, *fallback]
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        rewrite(
            directories[name],
            normalizer=None,
            pre_tokenizer=step,
            decoder={"type": "Sequence", "decoders": [*back, strip]},
        )
    directories["spaced_byte_level"] = spaced
    return {
        "byte": tokenizers.ByteTokenizer(),
        "trained": trained,
        "llama": tokenizers.SentencePieceTokenizer(models["prefixed"]),
        "t5": tokenizers.SentencePieceTokenizer(like_t5()),
        **{name: tokenizers.load(str(directory)) for name, directory in directories.items()},
    }


@pytest.mark.parametrize("name", KINDS)
@SLOW_FIXTURES
@given(text=TEXT)
@example(text="able")
@example(text=" b")
@example(text="  \n")
@example(text="\u2581 a\u2581")
@example(text=f"a {END}b{CALL}")
def test_a_part_inside_a_text_comes_back_as_it_was_given(small, name, text):
    tokenizer = small[name]
    assert tokenizer.decode(tokenizer.encode(text, inside=True), inside=True) == text


@pytest.mark.parametrize("name", KINDS)
@SLOW_FIXTURES
@given(first=TEXT, second=TEXT)
@example(first="un", second="able")
@example(first="a", second=" b")
def test_parts_of_a_text_are_joined_as_they_were_given(small, name, first, second):
    """The first part may lose or keep a space at its start, as the tokenizer treats the starts of texts."""
    tokenizer = small[name]
    start = tokenizer.encode("x" + first)
    whole = tokenizer.decode([*start, *tokenizer.encode(second, inside=True)])
    assert whole == tokenizer.decode(start) + second


@pytest.mark.parametrize("name", PREFIXED)
def test_only_the_start_of_a_text_gets_a_space(small, name):
    tokenizer = small[name]
    inside = tokenizer.encode("able", inside=True)
    assert tokenizer.encode("able") != inside == tokenizer.encode("able!", inside=True)[: len(inside)]
    assert tokenizer.token_bytes()[inside].sum() == 4


@pytest.mark.parametrize("name", REAL)
@SLOW_FIXTURES
@given(text=TEXT)
@example(text="able")
@example(text=" b")
def test_parts_come_back_from_released_tokenizers(data_dir, name, text):
    """Qwen2's composes accents, and MaxText's, without bytes, cannot write every character."""
    tokenizer = released(data_dir, name)
    ids = tokenizer.encode(text, inside=True)
    if name == "qwen2":
        text = library.normalizers.NFC().normalize_str(text)
    if name == "maxtext-default" and text not in ("able", " b"):
        text = tokenizer.decode(ids, inside=True)
    assert tokenizer.decode(ids, inside=True) == text


_RELEASED = {}


def released(data_dir, name):
    if name not in _RELEASED:
        _RELEASED[name] = tokenizers.load_directory(f"{data_dir}/tokenizers/{name}")
    return _RELEASED[name]


# --- control tokens


@pytest.mark.parametrize("name", ["byte_level", "spaced_byte_level", "llama_json", "metaspace", "legacy"])
@pytest.mark.parametrize("text", [f"a{END} b", f"{END}{END}", "<s>a b</s> c", f" {MASK}x", "a b"])
def test_control_tokens_are_tokens_where_they_are_asked_for(small, name, text):
    """As in the library itself, which finds them by default."""
    tokenizer = small[name]
    plain = library.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    plain.no_truncation()
    for piece in tokenizer.controls:
        plain.add_special_tokens([library.AddedToken(piece, normalized=False, special=True)])
    assert tokenizer.encode(text, special=True) == plain.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text, inside=True), inside=True) == text
