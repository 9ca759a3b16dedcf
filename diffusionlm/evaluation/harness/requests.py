"""Requests of the harness as token ids: their keys, their contexts, and what of them fits into the model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusionlm.data.chat_templates import Message
from diffusionlm.data.jinja_templates import JinjaTemplate
from diffusionlm.errors import UserError
from diffusionlm.likelihood.pairs import Pair
from diffusionlm.pretrained.chat import AnyTemplate
from diffusionlm.pretrained.model import LoadedModel


class Dialogue(str):
    """A dialogue in a chat template: the text that people read, with the token ids that the model reads.

    Read again, the text would not always give these ids, as control tokens may have no text, and what a user typed is
    never one.
    """

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int] = ()) -> "Dialogue":
        """Make a text with ids."""
        dialogue = super().__new__(cls, text)
        dialogue.ids = tuple(ids)
        return dialogue


class Document(NamedTuple):
    """Name the document that a request comes from; requests of one document are its choices."""

    task: str
    number: int | None

    def __str__(self) -> str:
        return f"task {self.task}, document {self.number}"


@dataclass(frozen=True)
class Request:
    """A continuation to score after a context.

    Attributes:
      document: where it comes from.
      context: a text or a `Dialogue`.
      continuation: the text that is scored.
    """

    document: Document
    context: str
    continuation: str

    def to_json(self) -> list[Any]:
        """Return what identifies the request among the records of an evaluation."""
        return [self.document.task, self.document.number, self.context, self.continuation]


class Encoded(NamedTuple):
    """A request that fits into the model."""

    pair: Pair
    truncated: bool  # whether the context lost tokens at its start


def key_of(*parts: Any) -> int:
    """Return a number from 0 to 2**31 - 1 that keys the noise of a request by its content.

    So a request has the same noise whatever is evaluated beside it, and wherever a cache has its answer.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def encode(model: LoadedModel, request: Request) -> Encoded:
    """Return the ids of a request; a context that is too long loses tokens at its start, as in the harness' own models.

    Raises:
      UserError: the continuation is empty, or does not fit into the model.
    """
    if isinstance(request.context, Dialogue):
        tokenizer = model.require_tokenizer()
        prefix, target = list(request.context.ids), tokenizer.encode(request.continuation, inside=True)
    else:
        ((prefix, target),) = model.encode_pairs([(request.context, request.continuation)])
    if not target:
        raise UserError(f"{request.document}: the continuation {request.continuation!r} adds no token to its context")
    room = model.config.max_length - len(target)
    if room < int(model.config.shifted):
        raise UserError(
            f"{request.document}: the continuation has {len(target)} tokens, and the model's context "
            f"{model.config.max_length}; leave the document out"
        )
    kept = prefix[max(0, len(prefix) - room) :]
    return Encoded((kept, target), len(kept) < len(prefix))


def encode_text(model: LoadedModel, text: str) -> tuple[list[int], int]:
    """Return the ids of a whole text, and how many at their start are given: what stands before it.

    The harness divides by all bytes of the text, so each of its tokens must be paid for. Without a start token nothing
    is given to a model that predicts tokens at their own places. A model that predicts each token at the place before,
    as autoregressive ones do, reads EOS there, as the harness' own models do.

    Raises:
      UserError: the text has no token, or nothing can stand before it.
    """
    ids, given = model.encode(text), len(model.encode(""))
    if len(ids) == given:
        raise UserError(f"the text {text!r} has no token to score")
    if given or not model.config.shifted:
        return ids, given
    if not model.config.eos_ids:
        raise UserError(
            "nothing predicts the first token of a text, as this model has neither a start token nor an end of text; "
            "leave out tasks of whole texts, and use the task perplexity, which does not count that token"
        )
    return [model.config.eos_ids[0], *ids], 1


def encode_prompt(model: LoadedModel, context: str, length: int) -> Encoded:
    """Return the ids of a prompt that leaves room for an answer of `length` tokens, with an empty target.

    Raises:
      UserError: an answer of that length leaves no room for a prompt.
    """
    ids = list(context.ids) if isinstance(context, Dialogue) else model.encode(context)
    room = model.config.max_length - length
    if room < 1:
        raise UserError(
            f"max_gen_toks={length} leaves no room for a prompt in the model's context of {model.config.max_length}; "
            f"give fewer with --gen_kwargs max_gen_toks=N"
        )
    kept = ids[max(0, len(ids) - room) :]
    return Encoded((kept, []), len(kept) < len(ids))


def encode_dialogue(model: LoadedModel, messages: Sequence[dict[str, str]], answer_begins: bool) -> Dialogue:
    """Return a dialogue in the model's chat template.

    Args:
      model: the model, which has a template.
      messages: the messages; with `answer_begins` the last is the assistant's, and the answer goes on from there.
      answer_begins: whether the answer has begun.

    Raises:
      UserError: the model has no template, or no place for these messages in it.
    """
    checked = [Message(message["role"], message["content"]) for message in messages]
    if not answer_begins:
        ids = model.encode_messages(checked)
    else:
        ids = model.encode_messages(checked[:-1])
        ids += model.require_tokenizer().encode(checked[-1].content, inside=True)
    return Dialogue(_written(model.template, checked, answer_begins), ids)


def _written(template: AnyTemplate | None, messages: Sequence[Message], answer_begins: bool) -> str:
    """Return the text of a dialogue as a template writes it, for people."""
    assert template is not None  # or `encode_messages` has refused
    begun = messages[-1].content if answer_begins else ""
    turns = messages[:-1] if answer_begins else messages
    if isinstance(template, JinjaTemplate):
        return template.render(turns) + begun
    before = template.turn.split("{content}")[0].replace("{role}", "assistant")
    written = (template.turn.replace("{role}", role).replace("{content}", content.strip()) for role, content in turns)
    return "".join(written) + before + begun
