"""Dialogues for tests of instruction data, and their records by definition."""

import json
from pathlib import Path

from diffusionlm.data import prepare as prepare_lib
from diffusionlm.data import tokenizers
from diffusionlm.data.chat_templates import Message
from diffusionlm.data.items import Item

BYTE = tokenizers.ByteTokenizer()
EOS = BYTE.eos_id
LENGTH = 80
QUESTION = [Message("user", "2+2?"), Message("assistant", "4")]
TWO_TURNS = [*QUESTION, Message("user", "Sure?"), Message("assistant", "Yes.")]


def item(record):
    return Item("file:1", json.dumps(record).encode(), True, 0)


def prepare_dialogues(source, output, **settings):
    settings = {"tokenizer": "byte", "sequence_length": LENGTH, "validation_fraction": 0, "format": "sft"} | settings
    source = [str(path) for path in source] if isinstance(source, list) else str(source)
    return prepare_lib.prepare(source, output, progress=False, **settings)


def write_dialogues(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def turns(messages, role_key="role", content_key="content"):
    return [{role_key: role, content_key: content} for role, content in messages]


def expected_record(messages, length=LENGTH):
    """Return the record of a dialogue, written down by hand for the plain template and bytes."""
    tokens, segments = [EOS], [1]
    for number, (role, content) in enumerate(messages):
        if role == "assistant":
            before, after = "### assistant\n", "" if number == len(messages) - 1 else "\n\n"
        else:
            before, after = "", ""
            content = f"### {role}\n{content}\n\n"
        answers = sum(role == "assistant" for role, _ in messages[:number])
        for text, part in ((before, 1), (content, 2 if role == "assistant" else 1), (after, 3)):
            tokens += text.encode()
            segments += [2 * answers + part] * len(text.encode())
    answers = sum(role == "assistant" for role, _ in messages)
    padding = length + 1 - len(tokens)
    return tokens + [EOS] * padding, segments + [2 * answers] + [0] * (padding - 1)
