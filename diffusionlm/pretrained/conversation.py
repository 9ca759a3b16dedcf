"""A dialogue with a model: its messages, the settings of its answers, and the file that keeps both."""

import bisect
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from etils import epath

from diffusionlm import schema
from diffusionlm.data.chat_templates import Message
from diffusionlm.errors import UserError, suggest
from diffusionlm.pretrained.completion import Draft
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import CHAT, SamplingConfig
from diffusionlm.storage import run_path, write_atomically
from diffusionlm.untrusted import printable

INFINITY = "inf"  # JSON has no infinity, which eos_penalty may be
_PROBE = Message("user", "x")  # a message that every template can write


class _Turn(schema.Record, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: str


class Saved(schema.Record, frozen=True):
    """A dialogue in a file; `messages` has the form that fine-tuning reads."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    messages: list[_Turn]
    sampling: dict[str, Any]  # the settings that differ from those of `chat`
    repeats: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Question(NamedTuple):
    """A message to be answered."""

    before: list[Message]  # the turns before it
    message: Message
    forgotten: int  # the oldest turns that are not read
    read: list[Message]  # what the model reads
    repeats: int  # the number of answers that this one follows
    seed: int


class Conversation:
    """A dialogue with a model that has a chat template.

    The model reads the system message and as many of the newest turns as fit into its context beside an answer.

    Args:
      model: the model.
      sampling: the settings of its answers; None: those of the command `chat`.
      system: the system message; None: there is none.

    Attributes:
      model: the model.
      turns: what the user and the model said alternately; the last is the model's.
      forgotten: the number of the oldest turns that the last answer did not read, as they did not fit.

    Raises:
      UserError: the model has no chat template or no tokenizer, a setting has no meaning for it, or its template has no
        place for the system message.
    """

    def __init__(self, model: LoadedModel, sampling: SamplingConfig | None = None, *, system: str | None = None):
        if not model.has_chat_template:
            raise UserError(
                "this model has no chat template, as it was not fine-tuned on dialogues: fine-tune it (docs/sft.md), "
                "or continue texts with `generate` or `diffusionlm sample`"
            )
        self.model = model
        self.turns: list[Message] = []
        self.forgotten = 0
        self._repeats = 0
        self._chosen, self._system = CHAT, None
        self.sampling = sampling or CHAT
        self.system = system

    @property
    def sampling(self) -> SamplingConfig:
        """The settings of the next answer; without a strategy, a masked diffusion model uses low_confidence."""
        if self._chosen.strategy is None and not self.model.config.autoregressive:
            return dataclasses.replace(self._chosen, strategy="low_confidence")
        return self._chosen

    @sampling.setter
    def sampling(self, sampling: SamplingConfig) -> None:
        self.model.sampling_config(sampling)
        if sampling.length >= self.model.config.max_length:
            raise UserError(
                f"an answer of length={sampling.length} leaves no room for a message in the model's context of "
                f"{self.model.config.max_length}; ask for a smaller length"
            )
        self._chosen = sampling

    @property
    def system(self) -> str | None:
        """The system message, or None."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None:
            with_text = self.model.encode_messages([Message("system", text), _PROBE])
            if with_text == self.model.encode_messages([_PROBE]):
                raise UserError("this model's template has no place for a system message; leave it out")
        self._system = text

    @property
    def messages(self) -> list[Message]:
        """The system message, if there is one, and all turns."""
        return self._with_system(self.turns)

    def ask(self, text: str) -> str:
        """Return the answer to a message, and add both to the dialogue.

        Raises:
          UserError: the message is empty, cannot be written in the template, or leaves no room for an answer; or any of
            `LoadedModel.generate`.
        """
        return self._generate(self._new_question(text))

    def regenerate(self) -> str:
        """Return another answer to the last message, with other random numbers; it replaces the old one.

        Raises:
          UserError: there is no message yet; or any of `ask`.
        """
        return self._generate(self._last_question())

    def stream(self, text: str, *, pinned: Mapping[int, str] | None = None) -> Iterator[Draft]:
        """Yield the states of the answer to a message; after the last, both are added to the dialogue.

        Args:
          text: the message.
          pinned: texts of the answer, by their positions in tokens from 0.

        Raises:
          UserError: any of `ask`; at the end, the dialogue has changed since the answer began.
        """
        return self._stream(self._new_question(text), pinned)

    def stream_again(self, *, pinned: Mapping[int, str] | None = None) -> Iterator[Draft]:
        """Yield the states of another answer to the last message, which replaces the old one after the last state.

        Raises:
          UserError: any of `regenerate` and `stream`.
        """
        return self._stream(self._last_question(), pinned)

    def reset(self) -> None:
        """Forget all turns; the system message and the settings stay."""
        self.turns, self.forgotten, self._repeats = [], 0, 0

    def save(self, path: epath.PathLike) -> None:
        """Write the messages and settings to a JSON file, atomically; an existing file is replaced."""
        messages = [message._asdict() for message in self.messages]
        content = {"version": 1, "messages": messages, "sampling": _changes(self._chosen), "repeats": self._repeats}
        write_atomically(run_path(path), json.dumps(content, indent=2, allow_nan=False) + "\n")

    def load(self, path: epath.PathLike) -> None:
        """Continue the dialogue of a file that `save` wrote, with its settings.

        Raises:
          UserError: any of `read`; or a setting has no meaning for this model, or its template cannot write the
            messages. Then nothing changes.
          OSError: the file cannot be read.
        """
        self.resume(read(path), path)

    def resume(self, saved: Saved, source: epath.PathLike) -> None:
        """Continue a dialogue that `read` returned, with its settings.

        Args:
          saved: the dialogue.
          source: the file that it was read from, for the messages.

        Raises:
          UserError: a setting has no meaning for this model, or its template cannot write the messages. Then nothing
            changes.
        """
        turns = [Message(turn.role, turn.content) for turn in saved.messages]
        system = turns.pop(0).content if turns and turns[0].role == "system" else None
        try:
            loaded = Conversation(self.model, sampling_of(saved), system=system)
            self.model.encode_messages(loaded._with_system([*turns, _PROBE]))
        except UserError as error:
            raise UserError(f"{printable(source)}: {error}") from error
        self._chosen, self._system = loaded._chosen, system
        self.turns, self.forgotten, self._repeats = turns, 0, saved.repeats

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return ([] if self._system is None else [Message("system", self._system)]) + turns

    def _new_question(self, text: str) -> _Question:
        if not text.strip():
            raise UserError("an empty message has no answer; write something")
        return self._question(self.turns, Message("user", text), 0)

    def _last_question(self) -> _Question:
        if not self.turns:
            raise UserError("there is no answer yet; write a message first")
        return self._question(self.turns[:-2], self.turns[-2], self._repeats + 1)

    def _question(self, before: list[Message], message: Message, repeats: int) -> _Question:
        self.model.encode_messages(self._with_system([message]))  # or it is refused for what it says itself
        try:
            forgotten = self._turns_to_leave_out([*before, message])
        except UserError as error:
            raise UserError(f"an earlier answer cannot be read again; regenerate it, or reset: {error}") from error
        read_turns = self._with_system([*before[forgotten:], message])
        n, room = len(self.model.encode_messages(read_turns)), self.model.config.max_length - self.sampling.length
        if n > room:
            what = "message has" if self._system is None else "system message and the message have"
            raise UserError(
                f"the {what} {n} tokens in the template, and the context of {self.model.config.max_length} leaves "
                f"{room} beside an answer of length={self.sampling.length}; shorten it, or ask for a smaller length"
            )
        return _Question(before, message, forgotten, read_turns, repeats, (self.sampling.seed + repeats) % 2**31)

    def _turns_to_leave_out(self, turns: list[Message]) -> int:
        """Return the number of the oldest turns without which the others leave room for an answer, if any do."""
        room = self.model.config.max_length - self.sampling.length

        def fits(pair: int) -> bool:
            return len(self.model.encode_messages(self._with_system(turns[2 * pair :]))) <= room

        pairs = range(len(turns) // 2)  # of questions with their answers, before the last question
        return 2 * bisect.bisect_left(pairs, True, key=fits)

    def _generate(self, question: _Question) -> str:
        (completion,) = self.model.generate(messages=question.read, sampling=self.sampling, seed=question.seed)
        self._add(question, completion.text)
        return completion.text

    def _stream(self, question: _Question, pinned: Mapping[int, str] | None) -> Iterator[Draft]:
        began = self.turns
        drafts = self.model.stream(messages=question.read, sampling=self.sampling, pinned=pinned, seed=question.seed)
        text = ""
        for draft in drafts:
            text = draft.text
            yield draft
        if self.turns is not began:
            raise UserError("the dialogue has changed since this answer began, so it is dropped; ask again")
        self._add(question, text)

    def _add(self, question: _Question, answer: str) -> None:
        self.turns = [*question.before, question.message, Message("assistant", answer)]
        self.forgotten, self._repeats = question.forgotten, question.repeats


def read(path: epath.PathLike) -> Saved:
    """Return a dialogue that was saved, checked.

    Raises:
      UserError: the file is damaged, its turns are not those of a user and a model alternately, or a setting is unknown
        or has no meaning.
      OSError: it cannot be read.
    """
    saved = schema.read_json(run_path(path), Saved)
    turns = saved.messages[1:] if saved.messages and saved.messages[0].role == "system" else saved.messages
    for i, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[i % 2]:
            raise UserError(
                f"{printable(path)}: turn {i + 1} is of the role {turn.role!r}; user and assistant must alternate, "
                "after at most one system message"
            )
    if len(turns) % 2:
        raise UserError(f"{printable(path)}: its last message is of the user; it must be an answer")
    try:
        sampling_of(saved).validate()
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    return saved


def sampling_of(saved: Saved) -> SamplingConfig:
    """Return the settings of a saved dialogue; raise `UserError` for an unknown one, or one of another type."""
    known = [field.name for field in dataclasses.fields(SamplingConfig)]
    if unknown := sorted(set(saved.sampling) - set(known)):
        raise UserError(f"unknown sampling setting {printable(unknown[0])!r}{suggest(unknown[0], known)}")
    values = dict(saved.sampling)
    if values.get("eos_penalty") == INFINITY:
        values["eos_penalty"] = math.inf
    return schema.convert(dataclasses.asdict(CHAT) | values, SamplingConfig, "sampling")


def _changes(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the settings that differ from those of `chat`, in JSON types."""
    defaults = dataclasses.asdict(CHAT)
    values = {name: value for name, value in dataclasses.asdict(sampling).items() if value != defaults[name]}
    return {name: INFINITY if value == math.inf else value for name, value in values.items()}
