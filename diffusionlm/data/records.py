"""The published shapes of instruction data: a JSON object into the messages of a dialogue, whole.

Every field of a record becomes a message, is named as unread, or makes the record malformed; nothing is dropped unsaid.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from diffusionlm.data.chat_templates import ROLES, Message
from diffusionlm.data.items import checked_text, is_empty

# Fields of a record with one question.
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
BELOW_INSTRUCTION = ("input", "context")  # Alpaca's and Dolly's names for the text that an instruction is about
# Fields of a record with a dialogue, and the fields of its messages: role, content.
DIALOGUES = {"messages": ("role", "content"), "conversations": ("from", "value")}
SPEAKERS = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
NUMBERING = ("id",)  # fields that only number the records


class Record(NamedTuple):
    """The messages of a JSON object, and its fields that no message is made of."""

    messages: list[Message]
    unread: list[str]  # fields that hold something and are not read; those of messages after a dot


def read_record(record: dict[str, Any], ignored: Collection[str] = ()) -> Record:
    """Return the messages of a record, and the names of the fields that they leave out.

    Args:
      record: a JSON object.
      ignored: names of fields that are taken for absent, such as "category" and "messages.name".

    Raises:
      ValueError: it has no known shape, or more than one, or a value is of another type; the message is the reason.
    """
    fields = {name: value for name, value in record.items() if name not in ignored}
    shape = _shape(fields)
    if shape[0] in DIALOGUES:
        messages, unread = _dialogue(shape[0], fields[shape[0]], ignored)
        used = {*shape, "system"}
    else:
        messages, used = _question(fields, *shape)
        unread = []
    if not is_empty(system := fields.get("system")):
        text = checked_text("field 'system'", system)
        if messages and messages[0].role == "system":
            raise ValueError("both the field 'system' and a first message are by the system; remove one")
        messages = [Message("system", text), *messages]
    names = [name for name, value in fields.items() if name not in {*used, *NUMBERING} and not is_empty(value)]
    return Record(messages, names + unread)


def _shape(fields: dict[str, Any]) -> tuple[str, ...]:
    """Return the fields by which a record is known.

    Raises:
      ValueError: none or several sets of fields are there.
    """
    shapes = [*PAIRS, *((name,) for name in DIALOGUES)]
    holding = {name for name, value in fields.items() if value is not None}
    fitting = [shape for shape in shapes if holding >= {*shape}] or [shape for shape in shapes if {*fields} >= {*shape}]
    if not fitting:
        known = ", ".join("+".join(shape) for shape in shapes)
        raise ValueError(f"fields {', '.join(map(repr, fields)) or 'none'} are of no known shape; known: {known}")
    if len(fitting) > 1:
        names = " and ".join("+".join(shape) for shape in fitting)
        raise ValueError(f"the fields fit {names}, and only one can be meant; name those to leave out in ignore_fields")
    return fitting[0]


def _question(fields: dict[str, Any], question: str, answer: str) -> tuple[list[Message], set[str]]:
    """Return the messages of a record with one question, which may follow others, and the fields that it may have."""
    used = {question, answer, "system", "history"}
    prompt = checked_text(f"field {question!r}", fields[question])
    if question == "instruction":
        used |= {*BELOW_INSTRUCTION}
        below = [name for name in BELOW_INSTRUCTION if not is_empty(fields.get(name))]
        if len(below) > 1:
            raise ValueError(f"the fields {' and '.join(map(repr, below))} both hold what the instruction is about")
        for name in below:
            prompt += "\n\n" + checked_text(f"field {name!r}", fields[name])
    response = checked_text(f"field {answer!r}", fields[answer])
    messages = _history(fields.get("history"))
    return [*messages, Message("user", prompt), Message("assistant", response)], used


def _history(turns: Any) -> list[Message]:
    """Return the messages of earlier questions, each a pair [question, answer]."""
    messages: list[Message] = []
    if is_empty(turns):
        return messages
    if not isinstance(turns, list):
        raise ValueError(f"field 'history' is {type(turns).__name__}, not a list of pairs")
    for i, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"history[{i}] is not a pair of a question and its answer")
        for j, role in enumerate(("user", "assistant")):
            messages.append(Message(role, checked_text(f"history[{i}][{j}]", turn[j])))
    return messages


def _dialogue(field: str, turns: Any, ignored: Collection[str]) -> tuple[list[Message], list[str]]:
    """Return the messages of a list of turns, and the names of the fields of turns that are not read, once each."""
    if not isinstance(turns, list):
        raise ValueError(f"field {field!r} is {type(turns).__name__}, not a list of messages")
    messages, unread = [], {}
    for i, turn in enumerate(turns):
        messages.append(_message(f"{field}[{i}]", turn, *DIALOGUES[field]))
        for key, value in turn.items():
            name = f"{field}.{key}"
            if key not in {*DIALOGUES[field], *NUMBERING} and name not in ignored and not is_empty(value):
                unread[name] = None
    return messages, list(unread)


def _message(location: str, turn: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict) or not {role_key, content_key} <= set(turn):
        raise ValueError(f"{location} is not an object with the fields {role_key!r} and {content_key!r}")
    if not isinstance(speaker := turn[role_key], str) or speaker not in SPEAKERS:
        raise ValueError(f"{location} is by {speaker!r}; known: {', '.join(SPEAKERS)}")
    return Message(SPEAKERS[speaker], checked_text(f"{location}[{content_key!r}]", turn[content_key]))
