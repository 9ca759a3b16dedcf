"""Chat templates: how messages become the tokens of a prompt, in fine-tuning and in sampling alike.

A template travels as plain JSON in the dataset's metadata, and from there in the sidecar of checkpoints, so a sampler
writes prompts as training did. A new template is one entry in `TURNS`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusionlm.data.tokenizers import Tokenizer, require_eos
from diffusionlm.errors import UserError, suggest

VERSION = 1
ROLES = ("system", "user", "assistant")
# One turn of a dialogue. The text before the content of an assistant's turn ends a prompt; its answer ends with EOS.
TURNS = {
    # arXiv 2502.09992; its released tokenizers have these pieces
    "llada": "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "plain": "### {role}\n{content}\n\n",  # for any tokenizer; line breaks, as no piece of a word crosses one
    "none": "{content}",  # prompts that are written out in full
}
LLADA_START = "<|startoftext|>"  # written once, before the first turn
_PIECE = re.compile(r"<\|\w+\|>")


class Message(NamedTuple):
    """One turn of a dialogue."""

    role: str  # one of ROLES
    content: str


class Part(NamedTuple):
    """Consecutive tokens of a dialogue that belong to one answer, or to the prompt before it."""

    ids: list[int]
    answer: bool
    text: str  # an answer's content; "" for a prompt


@dataclass(frozen=True)
class Template:
    """The form in which the turns of a dialogue are written."""

    name: str  # for people
    turn: str  # a turn, with {role} and {content}
    start_id: int  # the token that every prompt begins with

    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to rebuild the template, in JSON types."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Template":
        """Rebuild a template from its `to_dict`.

        Raises:
          UserError: the values are of another version, or damaged.
        """
        if not isinstance(values, dict) or values.get("version") != VERSION:
            version = values.get("version") if isinstance(values, dict) else values
            raise UserError(f"a chat template of version {version!r}, and this diffusionlm knows {VERSION}: upgrade")
        try:
            template = cls(**{name: value for name, value in values.items() if name != "version"})
            _, _ = template.turn.split("{content}")
            if not isinstance(template.name, str) or not isinstance(template.start_id, int):
                raise TypeError(f"name {template.name!r}, start_id {template.start_id!r}")
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the chat template is damaged ({error}); restore the original file") from error
        return template

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Return the tokens after which an answer to the last of these messages comes.

        Raises:
          ValueError: the messages cannot be written in this template; the message is the reason.
        """
        if not any(message.role == "user" for message in messages):
            raise ValueError("no message of a user, whom an answer would follow")
        parts = self.parts([*messages, Message("assistant", "")], tokenizer)
        return [i for part in parts for i in part.ids]

    def parts(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[Part]:
        """Return the prompts and answers of a dialogue alternately, up to its last answer; each is encoded on its own.

        So the tokens of a shorter history begin those of a longer one, and an answer's tokens do not depend on what
        stands before it, except that only the first part begins a text. A message of the assistant is an answer once a
        user has spoken; the EOS after it is not included.

        Raises:
          ValueError: the messages cannot be written in this template; the message is the reason.
        """
        if self.bare and len(messages) > 2:
            raise ValueError("several turns, which template=none cannot tell apart; use another template")
        reserved = [*self._pieces, *tokenizer.marks]
        before, after = self.turn.split("{content}")
        parts: list[Part] = []
        pending, asked = "", False
        for role, content in messages:
            if not self.bare:
                content = content.strip()
            self._require_plain_text(content, reserved)
            pending += before.replace("{role}", role)
            if role == "assistant" and asked:
                start = [] if parts else [self.start_id]
                parts.append(Part([*start, *self._encode(pending, tokenizer, inside=bool(parts))], False, ""))
                parts.append(Part(tokenizer.encode(content, inside=pending != "" or len(parts) > 1), True, content))
                pending = after
            else:
                pending += content + after
                asked = asked or role == "user"
        return parts

    @property
    def bare(self) -> bool:
        """True if the template writes nothing of its own, so that an answer just continues the prompt."""
        return self.turn == "{content}"

    def _require_plain_text(self, content: str, reserved: Sequence[str]) -> None:
        """Raise `ValueError` if a text holds what marks turns, or another token that is not text."""
        for piece in reserved:
            if piece in content:
                raise ValueError(f"a text holds {piece!r}, which is a token of its own and not text; remove it")
        if self._marking_lines and (line := self._marking_lines.search(content)):
            raise ValueError(f"a text holds the line {line[0]!r}, which marks turns in the template; remove it")

    @functools.cached_property
    def _marking_lines(self) -> re.Pattern[str] | None:
        """The lines that begin a turn; None where turns are marked by tokens of their own."""
        line = self.turn.split("{content}")[0].strip()
        if self._pieces or not line:
            return None
        roles = "|".join(re.escape(line.replace("{role}", role)) for role in ROLES)
        return re.compile(rf"^(?:{roles})[^\S\n]*$", re.MULTILINE)

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return _PIECE.findall(self.turn)

    def _encode(self, text: str, tokenizer: Tokenizer, inside: bool) -> list[int]:
        return [i for ids in self._encode_pieces(text, tokenizer, inside) for i in ids]

    def _encode_pieces(self, text: str, tokenizer: Tokenizer, inside: bool) -> Iterator[list[int]]:
        """Yield the ids of a text in which the template's own pieces are single tokens."""
        if not self._pieces:
            yield tokenizer.encode(text, inside=inside)
            return
        for part in re.split(f"({'|'.join(map(re.escape, self._pieces))})", text):
            if part in self._pieces:
                yield [_required_id(tokenizer, part)]
            elif part:
                yield tokenizer.encode(part, inside=inside)
            inside = inside or part != ""


def choose(name: str, tokenizer: Tokenizer) -> Template:
    """Return a template for a tokenizer.

    Args:
      name: a key of `TURNS`, or "auto": llada if the tokenizer has its pieces, else plain.
      tokenizer: writes the prompts.

    Raises:
      UserError: the name is unknown, or the tokenizer lacks pieces of the template.
    """
    if name not in ("auto", *TURNS):
        raise UserError(f"unknown template {name!r}{suggest(str(name), ('auto', *TURNS))}")
    needed = (LLADA_START, *_PIECE.findall(TURNS["llada"]))
    missing = [piece for piece in needed if tokenizer.piece_id(piece) is None]
    if name == "llada" and missing:
        raise UserError(f"template=llada needs the piece {missing[0]!r}, which this tokenizer lacks; use plain")
    if name == "auto":
        name = "plain" if missing else "llada"
    # Other prompts begin as documents do in pre-training here, after the end of the one before.
    start_id = _required_id(tokenizer, LLADA_START) if name == "llada" else require_eos(tokenizer)
    return Template(name, TURNS[name], start_id)


def _required_id(tokenizer: Tokenizer, piece: str) -> int:
    i = tokenizer.piece_id(piece)
    if i is None:
        raise ValueError(f"the template's piece {piece!r} is not a token of this tokenizer")
    return i
