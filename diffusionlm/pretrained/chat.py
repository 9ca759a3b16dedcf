"""Dialogues as prompts: messages in any of their forms, written in a model's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data import jinja_templates
from diffusionlm.data.chat_templates import ROLES, Message, Template
from diffusionlm.data.jinja_templates import JinjaTemplate
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.untrusted import unencodable


class Prompt(NamedTuple):
    """A prompt that is ready to be completed."""

    text: str  # for people
    ids: list[int]
    templated: bool  # whether a chat template wrote it


MessageLike = Message | Mapping[str, str]  # a mapping has the keys "role" and "content"


AnyTemplate = Template | JinjaTemplate


def template_of(sidecar: Sidecar) -> AnyTemplate | None:
    """Return the chat template of a model that was fine-tuned on instructions, or None.

    Raises:
      UserError: the sidecar's template is damaged, or of another version.
    """
    return None if sidecar.template is None else jinja_templates.from_dict(sidecar.template)


def encode_messages(template: AnyTemplate | None, messages: Sequence[MessageLike], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a dialogue, to be followed by the answer to its last message.

    Raises:
      UserError: there is no template, or no place for these messages in it; one is malformed, or none is of a user.
    """
    if template is None:
        raise UserError("this model has no chat template; use `generate`, which continues texts")
    try:
        checked = [_to_message(i, message) for i, message in enumerate(messages)]
        return template.prompt_ids(checked, tokenizer)
    except ValueError as error:
        raise UserError(f"this model's prompts cannot be written: {error}") from error


def dialogues(messages: Any) -> list[Sequence[MessageLike]]:
    """Return the dialogues of one, or of several.

    Raises:
      UserError: it is neither, or there is no message.
    """
    several = isinstance(messages, list | tuple) and messages and all(isinstance(entry, list) for entry in messages)
    dialogues: list[Any] = [*messages] if several else [messages]
    for dialogue in dialogues:
        if isinstance(dialogue, Message) or not isinstance(dialogue, list | tuple) or not dialogue:
            raise UserError(f"messages={messages!r} must be a list of messages, or a list of such lists")
    return dialogues


def text_of(message: MessageLike) -> str:
    """Return the content of a message that `encode_messages` has taken."""
    return message.content if isinstance(message, Message) else message["content"]


def refuse_conflicts(
    prompts: object, messages: object, *, raw: bool, special_tokens: bool, template: AnyTemplate | None
) -> None:
    """Raise `UserError` for arguments of `generate` that exclude each other."""
    if messages is not None and (prompts != "" or raw or special_tokens):
        raise UserError("messages are written in the chat template, and exclude prompts, raw and special_tokens")
    if special_tokens and not raw and template is not None:
        raise UserError(
            "special_tokens needs raw: the model's chat template writes its own special tokens; add --raw and write "
            "them all, or drop special_tokens"
        )


def _to_message(i: int, value: object) -> Message:
    """Read a message in one of its forms; `ValueError` for anything else."""
    fields = dict(value) if isinstance(value, Mapping) else value._asdict() if isinstance(value, Message) else {}
    if set(fields) != set(Message._fields):
        raise ValueError(f"messages[{i}]={value!r} is neither a Message nor {{'role': ..., 'content': ...}}")
    for name, content in fields.items():
        if not isinstance(content, str):
            raise ValueError(f"{name} of messages[{i}] is {type(content).__name__}, not a text")
        if (reason := unencodable(content)) is not None:
            raise ValueError(f"{name} of messages[{i}] has {reason}")
    if fields["role"] not in ROLES:
        raise ValueError(f"role {fields['role']!r} of messages[{i}] is none of {', '.join(ROLES)}")
    return Message(**fields)
