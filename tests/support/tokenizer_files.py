"""Small tokenizers in the files of released ones, and byte pair encoding by its definition."""

import json
import re

import tokenizers as library
from sentencepiece import sentencepiece_model_pb2

from support.texts import DOCUMENTS

END, MASK, CALL = "<|endoftext|>", "<|mdm_mask|>", "<tool_call>"
CONTROLS = [*(f"a {piece}b" for piece in (END, MASK, "<s>", "</s>", "<unk>")), f"{END}{END}", " <s>", "<0x0A>"]
ASCII_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def train_byte_level():
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.add_special_tokens([END, MASK])
    tokenizer.add_tokens([CALL, "    "])
    return tokenizer


def write_byte_level(directory, *, settings=None):
    train_byte_level().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": END, "mask_token": {"content": MASK}} if settings is None else settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_merges(directory, name):
    """The vocabulary and merges of `train_byte_level` as files of their own."""
    definition = json.loads(train_byte_level().to_str())
    vocab = definition["model"]["vocab"]
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges_of(definition)))
    (directory / "added_tokens.json").write_text(json.dumps({END: len(vocab), CALL: len(vocab) + 1}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": END}))
    return directory


def merges_of(definition):
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in definition["model"]["merges"]]


def write_metaspace(directory, model):
    """A SentencePiece BPE model as a tokenizer.json in the form of LLaMA's.

    It joins the pair first whose piece was learnt first, which is what its scores say.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    learnt = sorted((-p.score, i, p.piece) for i, p in enumerate(proto.pieces) if p.type == p.NORMAL)
    merges = [(p[:k], p[k:]) for _, _, p in learnt for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    prefix = proto.normalizer_spec.add_dummy_prefix
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    special = dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | {"normalized": True, "special": True}
    definition = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [{"id": i, "content": piece} | special for i, piece in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}] * prefix + [spaces],
        },
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    special_tokens = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    return directory


def slow_bpe(text, vocab, merges):
    """Byte pair encoding by its definition: in each word, join the pair that was learnt first, until none is left."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + k) for k, byte in enumerate(hidden)}
    rank = {pair: k for k, pair in enumerate(merges)}
    ids = []
    for word in ASCII_WORDS.findall(text):
        parts = [letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in rank]:
            first, k = min(pairs, key=rank.get), 0
            while k < len(parts) - 1:
                if (parts[k], parts[k + 1]) == first:
                    parts[k : k + 2] = ["".join(first)]
                k += 1
        ids += [vocab[part] for part in parts]
    return ids
