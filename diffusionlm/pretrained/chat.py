"""Dialogues as prompts: messages in any of their forms, written in a model's chat template."""

from collections.abc import Mapping, Sequence

from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data.chat_templates import ROLES, Message, Template
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.untrusted import unencodable

MessageLike = Message | Mapping[str, str]  # a mapping has the keys "role" and "content"


def template_of(sidecar: Sidecar) -> Template | None:
    """Return the chat template of a model that was fine-tuned on instructions, or None.

    Raises:
      UserError: the sidecar's template is damaged, or of another version.
    """
    return None if sidecar.template is None else Template.from_dict(sidecar.template)


def encode_messages(template: Template | None, messages: Sequence[MessageLike], tokenizer: Tokenizer) -> list[int]:
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
