"""A dialogue with a model: its messages, the settings of its answers, and the file that keeps both."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from etils import epath

from diffusionlm import schema, untrusted
from diffusionlm.data.chat_templates import Message
from diffusionlm.errors import UserError
from diffusionlm.pretrained.completion import Draft
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import CHAT, SamplingConfig
from diffusionlm.storage import disk_path, run_path, write_atomically

INFINITY = "inf"  # JSON has no infinity, which eos_penalty may be


class _Turn(schema.Record, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: str


class _Saved(schema.Record, frozen=True):
    """A dialogue in a file; `messages` are those that fine-tuning reads."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    messages: list[_Turn]
    sampling: dict[str, Any]


class Conversation:
    """A dialogue with a model that has a chat template.

    The model reads the system message and as many of the newest turns as fit into its context beside an answer.

    Args:
      model: the model.
      sampling: the settings of its answers; None: those of the command `chat`. Without a strategy, a masked diffusion
        model uses low_confidence.
      system: the system message; None: there is none.

    Attributes:
      model: the model.
      sampling: the settings of the next answer.
      system: the system message, or None.
      turns: what the user and the model said alternately; the last is the model's.
      forgotten: the number of the oldest turns that the last answer did not read, as they did not fit.

    Raises:
      UserError: the model has no chat template or no tokenizer, or a setting has no meaning for it.
    """

    def __init__(self, model: LoadedModel, sampling: SamplingConfig | None = None, *, system: str | None = None):
        if not model.has_chat_template:
            raise UserError(
                "this model has no chat template, so it has not learnt to answer: fine-tune it on dialogues "
                "(docs/sft.md), or continue texts with `generate` or `diffusionlm sample`"
            )
        self.model = model
        self.sampling = sampling or CHAT
        if self.sampling.strategy is None and not model.config.autoregressive:
            self.sampling = dataclasses.replace(self.sampling, strategy="low_confidence")
        model.sampling_config(self.sampling)
        self.system = system
        self.turns: list[Message] = []
        self.forgotten = 0
        self._repeats = 0

    @property
    def messages(self) -> list[Message]:
        """The system message, if there is one, and all turns."""
        return self._with_system(self.turns)

    def ask(self, text: str) -> str:
        """Return the answer to a message, and add both to the dialogue.

        Raises:
          UserError: any of `stream`.
        """
        for _ in self.stream(text):
            pass
        return self.turns[-1].content

    def stream(self, text: str) -> Iterator[Draft]:
        """Yield the states of the answer to a message; after the last, both are added to the dialogue.

        Raises:
          UserError: the message is empty, cannot be written in the template, or leaves no room for an answer; or any of
            `LoadedModel.generate`.
        """
        if not text.strip():
            raise UserError("an empty message has no answer; write something")
        return self._answer(self.turns, Message("user", text), 0)

    def regenerate(self) -> Iterator[Draft]:
        """Yield the states of another answer to the last message, with other random numbers; it replaces the old one.

        Raises:
          UserError: there is no message yet; or any of `stream`.
        """
        if not self.turns:
            raise UserError("there is no answer yet; write a message first")
        return self._answer(self.turns[:-2], self.turns[-2], self._repeats + 1)

    def reset(self) -> None:
        """Forget all turns; the system message and the settings stay."""
        self.turns, self.forgotten, self._repeats = [], 0, 0

    def save(self, path: epath.PathLike) -> None:
        """Write the messages and settings to a JSON file, atomically; an existing file is replaced."""
        messages = [message._asdict() for message in self.messages]
        content = {"version": 1, "messages": messages, "sampling": _changes(self.sampling)}
        write_atomically(run_path(path), json.dumps(content, indent=2, allow_nan=False) + "\n")

    def load(self, path: epath.PathLike) -> None:
        """Continue the dialogue of a file that `save` wrote, with its settings.

        Raises:
          UserError: the file is damaged, or its turns are not those of a user and a model alternately, or a setting has
            no meaning for this model; then nothing changes.
          OSError: it cannot be read.
        """
        saved = schema.read_json(disk_path(path), _Saved)
        messages = [Message(turn.role, turn.content) for turn in saved.messages]
        system = messages.pop(0).content if messages and messages[0].role == "system" else None
        roles = [message.role for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise UserError(
                f"{untrusted.printable(path)}: its messages have the roles {', '.join(roles)}; they must be user and "
                "assistant alternately and end with an answer, after at most one system message"
            )
        sampling = _sampling_of(saved.sampling, path)
        self.model.sampling_config(sampling)
        self.sampling, self.system, self.turns = sampling, system, messages
        self.forgotten, self._repeats = 0, 0

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return ([] if self.system is None else [Message("system", self.system)]) + turns

    def _answer(self, before: list[Message], question: Message, repeats: int) -> Iterator[Draft]:
        forgotten = self._first_that_fits([*before, question])
        read = self._with_system([*before[forgotten:], question])
        seed = (self.sampling.seed + repeats) % 2**31
        drafts = self.model.stream(messages=read, sampling=self.sampling, seed=seed)

        def states() -> Iterator[Draft]:
            draft = None
            for draft in drafts:
                yield draft
            assert draft is not None  # there is a state before the first step
            self.turns = [*before, question, Message("assistant", draft.text)]
            self.forgotten, self._repeats = forgotten, repeats

        return states()

    def _first_that_fits(self, turns: list[Message]) -> int:
        """Return the number of the oldest turns to leave out, so that the others leave room for an answer."""
        room = self.model.config.max_length - self.sampling.length
        for first in range(0, len(turns), 2):  # a question with its answer
            n = len(self.model.encode_messages(self._with_system(turns[first:])))
            if n <= room:
                return first
        raise UserError(
            f"the message has {n} tokens in its template, and the context of {self.model.config.max_length} leaves "
            f"{max(0, room)} beside an answer of length={self.sampling.length}; shorten it, or ask for a smaller length"
        )


def _changes(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the settings that are not the defaults, in JSON types."""
    defaults = dataclasses.asdict(SamplingConfig())
    values = {name: value for name, value in dataclasses.asdict(sampling).items() if value != defaults[name]}
    return {name: INFINITY if value == math.inf else value for name, value in values.items()}


def _sampling_of(values: dict[str, Any], path: epath.PathLike) -> SamplingConfig:
    """Return settings that were saved, checked."""
    known = {field.name for field in dataclasses.fields(SamplingConfig)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"{untrusted.printable(path)}: unknown sampling setting {untrusted.printable(unknown[0])!r}")
    values = {name: math.inf if value == INFINITY else value for name, value in values.items()}
    sampling = schema.convert(values, SamplingConfig, path)
    sampling.validate()
    return sampling
