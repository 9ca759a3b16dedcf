"""Hugging Face tokenizers: exact byte counts, text that stays text, files that travel, and clear refusals."""

import json
import pickle
from pathlib import Path

import pytest
import tokenizers as library
from test_tokenizers import DOCUMENTS, TEXTS

from diffusionlm.data import tokenizers
from diffusionlm.data.templates import Message, Template
from diffusionlm.errors import UserError

END, MASK, MARK = "<|endoftext|>", "<|mask|>", "<think>"
SETTINGS = {"eos_token": END, "bos_token": None, "mask_token": MASK, "tokenizer_class": "GPT2Tokenizer"}


def byte_level() -> library.Tokenizer:
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(DOCUMENTS, trainer)
    return made


def metaspace() -> library.Tokenizer:
    """As LLaMA's: a space before the text, unknown characters by their bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("\u2581", "a", "b", "c", "é", "\u2581a", "ab", "\u2581ab"):
        vocabulary[piece] = len(vocabulary)
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b")]
    made = library.Tokenizer(library.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("\u2581"), library.normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = library.decoders.Sequence(
        [
            library.decoders.Replace("\u2581", " "),
            library.decoders.ByteFallback(),
            library.decoders.Fuse(),
            library.decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


def write(directory: Path, made: library.Tokenizer, settings: dict) -> Path:
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = byte_level()
    made.add_special_tokens([END, MASK])
    made.add_tokens([MARK])
    return write(tmp_path_factory.mktemp("tokenizer"), made, SETTINGS)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.load(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", [*TEXTS, *DOCUMENTS[:2], f"a {END} and {MASK}{MASK}"])
def test_every_byte_is_counted_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert not {tokenizer.eos_id, tokenizer.piece_id(MASK)} & set(ids)


def test_special_tokens_stand_for_no_text(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eos_id, tokenizer.piece_id(MASK)]) == "a b"
    assert tokenizer.token_bytes()[tokenizer.eos_id] == 0
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (350, 350, None)
    assert tokenizer.piece_id("a") is None and tokenizer.piece_id("<none>") is None
    assert tokenizer.vocab_size == 353 == len(tokenizer.token_bytes())
    assert tokenizer.decode([*tokenizer.encode("a"), 9999]) == "a"  # rows beyond the tokenizer's ids


def test_added_tokens_that_are_not_special_are_marks(tokenizer):
    assert tokenizer.marks == (MARK,)
    ids = tokenizer.encode(f"a{MARK}b")
    assert tokenizer.piece_id(MARK) in ids and tokenizer.token_bytes()[ids].sum() == len(f"a{MARK}b")
    template = Template("plain", "### {role}\n{content}\n\n", tokenizer.eos_id)
    with pytest.raises(ValueError, match="holds '<think>', which is a token of its own"):
        template.prompt_ids([Message("user", f"a {MARK}")], tokenizer)


def test_metaspace_counts_the_space_it_adds(tmp_path):
    tokenizer = tokenizers.from_directory(write(tmp_path / "t", metaspace(), {"bos_token": "<s>", "eos_token": "</s>"}))
    for text in ("ab a", "bé \n", "你😀", "  a  b", "<s> </s>", "<0x41>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == 1 + len(text.encode())
        assert not {1, 2} & set(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


def test_a_text_never_becomes_a_special_token(tmp_path):
    """A merge that makes the special token's text is refused when a text uses it."""
    vocabulary = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4, "\u2581": 5}
    made = library.Tokenizer(library.models.BPE(vocabulary, [("<", "s"), ("<s", ">")]))
    made.decoder = library.decoders.Sequence([library.decoders.ByteFallback(), library.decoders.Fuse()])
    made.add_special_tokens(["<s>"])
    tokenizer = tokenizers.from_directory(write(tmp_path / "t", made, {"bos_token": "<s>"}))
    assert tokenizer.encode("s<") == [1, 0]
    with pytest.raises(UserError, match="a text holds '<s>', which is a token of its own and no text; remove it"):
        tokenizer.encode("s<s>")


def test_it_travels_whole(tokenizer, folder):
    values = json.loads(json.dumps(tokenizer.to_dict()))
    for again in (tokenizers.from_dict(values), pickle.loads(pickle.dumps(tokenizer))):
        assert again.sha256 == tokenizer.sha256 and again.eos_id == tokenizer.eos_id
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert again.files() == {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="the stored tokenizer is damaged: sha256"):
        tokenizers.from_dict(values | {"sha256": "0" * 64})
    with pytest.raises(UserError, match="no readable files"):
        tokenizers.from_dict({"kind": "huggingface", "sha256": "", "files": {"tokenizer.json": "?"}})


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_a_vocabulary_and_merges_are_the_same_tokenizer(names, tokenizer, tmp_path):
    made = byte_level()
    vocabulary, merges = made.model.save(str(tmp_path))
    Path(vocabulary).rename(tmp_path / names[0])
    Path(merges).rename(tmp_path / names[1])
    added = {END: 350, MASK: 351}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    found = tokenizers.from_directory(tmp_path)
    assert [found.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (found.eos_id, found.piece_id(MASK), found.vocab_size) == (350, 351, 352)
    (tmp_path / "added_tokens.json").write_text(json.dumps({END: 500}))
    with pytest.raises(UserError, match="has id 500, and would get 350; give a tokenizer.json"):
        tokenizers.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(UserError, match="class BertTokenizer, and this version makes GPT2Tokenizer"):
        tokenizers.from_directory(tmp_path)


def test_other_kinds_and_damage_are_refused(tmp_path):
    other = library.Tokenizer(library.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="of kind WordPiece with another decoder"):
        tokenizers.from_directory(write(tmp_path / "t", other, {}))
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer's files cannot be read"):
        tokenizers.from_directory(tmp_path / "t")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        tokenizers.load(str(tmp_path / "tokenizer.json"))
    assert tokenizers.from_directory(tmp_path) is None


def test_real_tokenizers_give_published_ids(data_dir):
    folders = Path(data_dir) / "tokenizers"
    gpt2, qwen2 = (tokenizers.from_directory(folders / name) for name in ("gpt2", "qwen2"))
    assert gpt2.encode("Hello world") == [15496, 995] and qwen2.encode("Hello world") == [9707, 1879]
    assert (gpt2.eos_id, gpt2.bos_id, qwen2.eos_id, qwen2.pad_id) == (50256, 50256, 151645, 151643)
    assert len(qwen2.encode("2026")) == 4 and len(gpt2.encode("2026")) < 4
    lines = (Path(data_dir) / "tinystories" / "valid.jsonl").read_text().splitlines()[:100]
    texts = [*(json.loads(line)["text"] for line in lines), *(text for text in TEXTS if "\u0301" not in text)]
    for tokenizer in (gpt2, qwen2):
        counts = tokenizer.token_bytes()
        for text in texts:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and counts[ids].sum() == len(text.encode())
