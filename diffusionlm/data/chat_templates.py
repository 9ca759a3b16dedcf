"""Chat templates: how messages become the tokens of a prompt, in fine-tuning and in sampling alike.

A template travels as plain JSON in the dataset's metadata and from there in the sidecar of checkpoints, so that what
samples from a model writes prompts as its training did. A further template is one entry in `TURNS`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError, suggest

VERSION = 1
ROLES = ("system", "user", "assistant")
# One turn of a dialogue. What stands before the content of an assistant's turn ends a prompt; its answer ends with EOS.
TURNS = {
    # arXiv 2502.09992; its released tokenizers have these pieces
    "llada": "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "plain": "### {role}\n{content}\n\n",  # for any tokenizer; line breaks, as no piece of a word crosses one
    "none": "{content}",  # prompts that are written out in full
}
LLADA_START = "<|startoftext|>"  # stands once, before the first turn
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
    """How the turns of a dialogue are written."""

    name: str  # for people
    turn: str  # a turn, with {role} and {content}
    start_id: int  # the token that every prompt begins with

    def to_dict(self) -> dict:
        """Everything needed to rebuild it, in JSON types."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "Template":
        """Rebuilds what `to_dict` gave.

        Raises:
          UserError: another version, or something else.
        """
        if not isinstance(values, dict) or values.get("version") != VERSION:
            found = values.get("version") if isinstance(values, dict) else values
            raise UserError(f"a chat template of version {found!r}, and this diffusionlm knows {VERSION}: upgrade")
        try:
            template = cls(**{name: value for name, value in values.items() if name != "version"})
            _, _ = template.turn.split("{content}")
            if not isinstance(template.name, str) or not isinstance(template.start_id, int):
                raise TypeError(f"name {template.name!r}, start_id {template.start_id!r}")
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the chat template is damaged ({error}); restore the original file") from error
        return template

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The tokens that an answer to the last of these messages follows.

        Raises:
          ValueError: the messages cannot be written in this template; the reason.
        """
        if not any(message.role == "user" for message in messages):
            raise ValueError("no message of a user, whom an answer would follow")
        parts = self.parts([*messages, Message("assistant", "")], tokenizer)
        return [i for part in parts for i in part.ids]

    def parts(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[Part]:
        """The prompts and answers of a dialogue in turn, up to its last answer; each is encoded on its own.

        So the tokens of a longer history are those of a shorter one and more, and an answer's tokens do not depend on
        what stands before it. An answer that follows a user's message is one; the EOS after it is not included.

        Raises:
          ValueError: the messages cannot be written in this template; the reason.
        """
        if self.bare and len(messages) > 2:
            raise ValueError("several turns, which template=none cannot tell apart; use another template")
        reserved = [*self._pieces, *tokenizer.marks]
        before, after = self.turn.split("{content}")
        found, text, asked = [], "", False
        for role, content in messages:
            if not self.bare:
                content = content.strip()
            for piece in reserved:
                if piece in content:
                    raise ValueError(f"a text holds {piece!r}, which is a token of its own and no text; remove it")
            if self._marking_lines and (line := self._marking_lines.search(content)):
                raise ValueError(f"a text holds the line {line[0]!r}, which marks turns in the template; remove it")
            text += before.replace("{role}", role)
            if role == "assistant" and asked:
                start = [] if found else [self.start_id]
                found.append(Part([*start, *self._encode(text, tokenizer)], False, ""))
                found.append(Part(tokenizer.encode(content), True, content))
                text = after
            else:
                text += content + after
                asked = asked or role == "user"
        return found

    @property
    def bare(self) -> bool:
        """Whether it writes nothing, so that a prompt is only gone on from."""
        return self.turn == "{content}"

    @functools.cached_property
    def _marking_lines(self) -> re.Pattern | None:
        """Lines that begin a turn, where they are no tokens of their own."""
        line = self.turn.split("{content}")[0].strip()
        if self._pieces or not line:
            return None
        roles = "|".join(re.escape(line.replace("{role}", role)) for role in ROLES)
        return re.compile(rf"^(?:{roles})[^\S\n]*$", re.MULTILINE)

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return _PIECE.findall(self.turn)

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        return [i for ids in self._encoded(text, tokenizer) for i in ids]

    def _encoded(self, text: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
        """The ids of a text in which the template's own pieces are single tokens."""
        if not self._pieces:
            yield tokenizer.encode(text)
            return
        for part in re.split(f"({'|'.join(map(re.escape, self._pieces))})", text):
            if part in self._pieces:
                yield [tokenizer.piece_id(part)]
            elif part:
                yield tokenizer.encode(part)


def choose(name: Literal["auto", "llada", "plain", "none"], tokenizer: Tokenizer) -> Template:
    """The template of that name for a tokenizer; auto: llada where the tokenizer has its pieces, else plain.

    Raises:
      UserError: an unknown name, or a tokenizer that lacks pieces of the template.
    """
    if name not in ("auto", *TURNS):
        raise UserError(f"unknown template {name!r}{suggest(str(name), ('auto', *TURNS))}")
    needed = (LLADA_START, *_PIECE.findall(TURNS["llada"]))
    missing = [piece for piece in needed if tokenizer.piece_id(piece) is None]
    if name == "llada" and missing:
        raise UserError(f"template=llada needs the piece {missing[0]!r}, which this tokenizer lacks; use plain")
    name = ("plain" if missing else "llada") if name == "auto" else name
    # Elsewhere a prompt begins as documents do in pre-training here, after the end of the one before.
    start_id = tokenizer.piece_id(LLADA_START) if name == "llada" else tokenizer.eos_id
    return Template(name, TURNS[name], start_id)
