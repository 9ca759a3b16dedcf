"""Chat templates of released models, which are Jinja programs, as prompts of token ids.

They see what `transformers` shows them (`messages`, `add_generation_prompt`, the special tokens by role), inside a
bounded sandbox (`template_sandbox`). What a template writes is read with its control tokens as tokens; those that
someone typed into a message stay text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from diffusionlm import schema, untrusted
from diffusionlm.data import chat_templates
from diffusionlm.data.chat_templates import Message, Template
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError

VERSION = 2  # of the dictionary; version 1 is `Template`
MOST_SOURCE = 1 << 18  # characters of a template; the largest published ones have 20 thousand
_PRIVATE = range(0xF0000, 0x10FFFE)  # characters for private use, which stand for typed control tokens in a rendering


class _Fields(schema.Record, frozen=True):
    version: Literal[2]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    source: Annotated[str, msgspec.Meta(max_length=MOST_SOURCE)]
    tokens: dict[str, str]


@dataclass(frozen=True)
class JinjaTemplate:
    """A released model's chat template."""

    name: str  # for people: where it is from
    source: str  # the Jinja program
    tokens: Mapping[str, str]  # special tokens by role, such as "bos_token", which the program may write

    bare = False  # it always writes something of its own

    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to rebuild the template, in JSON types."""
        return {"version": VERSION, "name": self.name, "source": self.source, "tokens": dict(self.tokens)}

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a dialogue, up to where the answer to its last message begins.

        Raises:
          ValueError: the template refuses the messages, is malformed, or works too much; the message is the reason.
        """
        import jinja2  # here, since most prompts need no Jinja

        from diffusionlm.data.template_sandbox import Sandbox

        variables = {
            **self.tokens,
            "messages": [message._asdict() for message in messages],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        try:
            return Sandbox().render(self.source, variables)
        except jinja2.TemplateError as error:
            reason = untrusted.printable(f"{error}"[:300])
            raise ValueError(f"its chat template, {self.name}, refuses them: {reason}") from error

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Return the tokens after which an answer to the last of these messages comes.

        Without control tokens in the messages these are the ids of the rendered text in the tokenizer's own library.

        Raises:
          ValueError: the messages cannot be written in this template; the message is the reason.
        """
        messages, typed = _set_aside(messages, tokenizer.controls, self.source)
        text = self.render(messages)
        if not typed:
            return tokenizer.encode(text, special=True)
        ids: list[int] = []
        for k, part in enumerate(re.split(f"([{''.join(typed)}])", text)):
            inside = bool(ids)
            ids += tokenizer.encode(typed[part], inside=inside) if k % 2 else _written(part, tokenizer, inside)
        return ids


def from_dict(values: Any) -> Template | JinjaTemplate:
    """Rebuild a chat template from its `to_dict`.

    Raises:
      UserError: the values are of another version, or damaged.
    """
    version = values.get("version") if isinstance(values, dict) else values
    if version not in (chat_templates.VERSION, VERSION):
        known = f"{chat_templates.VERSION} and {VERSION}"
        raise UserError(f"a chat template of version {version!r}, and this diffusionlm knows {known}: upgrade")
    if version == chat_templates.VERSION:
        return Template.from_dict(values)
    fields = schema.convert(values, _Fields, "the chat template")
    return JinjaTemplate(fields.name, fields.source, fields.tokens)


def require_readable(template: JinjaTemplate) -> None:
    """Raise `UserError` for a template with an error in its syntax, or that uses what Jinja or the sandbox has not."""
    import jinja2

    from diffusionlm.data.template_sandbox import Sandbox

    try:
        Sandbox().check(template.source)
    except jinja2.TemplateError as error:
        reason = untrusted.printable(f"{error}"[:300])
        raise UserError(f"the chat template, {template.name}, cannot be read: {reason}") from error


def _written(text: str, tokenizer: Tokenizer, inside: bool) -> list[int]:
    return tokenizer.encode(text, inside=inside, special=True) if text else []


def _set_aside(
    messages: Sequence[Message], controls: Sequence[str], source: str
) -> tuple[Sequence[Message], dict[str, str]]:
    """Return the messages with a character for each control token that was typed into them, and these by character.

    The characters occur nowhere else, so that a rendering shows where the typed ones are.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or r"(?!)")
    found = sorted({piece for message in messages for piece in pattern.findall(message.content)})
    if not found:
        return messages, {}
    used = set(source).union(*(message.content for message in messages))
    unused: Iterator[str] = (character for character in map(chr, _PRIVATE) if character not in used)
    stand_ins = dict(zip(found, unused, strict=False))
    replaced = [
        message._replace(content=pattern.sub(lambda match: stand_ins[match[0]], message.content))
        for message in messages
    ]
    return replaced, {character: piece for piece, character in stand_ins.items()}
