"""Chat templates and end tokens of released models, from the files beside their weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from diffusionlm import schema, untrusted
from diffusionlm.data import jinja_templates
from diffusionlm.data.jinja_templates import JinjaTemplate
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.data.tokenizers.huggingface_files import SETTINGS_FILE, control_tokens, read_settings
from diffusionlm.errors import UserError
from diffusionlm.interop.config_json import ConfigJson

TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"


class Released(NamedTuple):
    """The chat template that a family published, for tokenizers that come without one."""

    source: str
    pieces: Sequence[str]  # the control tokens that it writes; the last ends a turn
    instruct: bool  # base models have these pieces too, so the model's name has to say that it is an Instruct model


FAMILIES = {
    # arXiv 2502.09992. Tokenizers of base models lack the pieces.
    "llada": Released(
        "{{ '<|startoftext|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        instruct=False,
    ),
    # Qwen2.5's, which Dream continues.
    "dream": Released(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        instruct=True,
    ),
}


def chat_template(
    directories: Sequence[Path], family: str, name: str, tokenizer: Tokenizer | None, choice: str | None
) -> JinjaTemplate | None:
    """Return the chat template of a released model, or None.

    Args:
      directories: where its files may be; the first that has a template counts.
      family: the family of its network.
      name: what the model is called.
      tokenizer: its tokenizer; without one there are no prompts, and no template.
      choice: the name of one of several templates, "none" for none, or None for the default one.

    Raises:
      UserError: a template is malformed, or `choice` is not the name of one.
    """
    if choice == "none" or tokenizer is None:
        if choice not in (None, "none"):
            raise UserError(f"chat_template={choice} needs a tokenizer; give the model's own with --tokenizer")
        return None
    for directory in directories:
        sources = _stored_templates(directory)
        if sources:
            label, source = _choose(sources, choice)
            template = JinjaTemplate(label, source, _special_tokens(directory))
            jinja_templates.require_readable(template)
            return template
    if choice is not None:
        raise UserError(f"chat_template={choice!r}: there is no chat template beside the weights; leave it out")
    released = FAMILIES.get(family)
    if released is None or not set(released.pieces) <= set(tokenizer.controls):
        return None
    if released.instruct and "instruct" not in name.lower():
        return None
    return JinjaTemplate(f"the one that {family} published", released.source, {})


def end_ids(
    directories: Sequence[Path],
    fields: ConfigJson,
    family: str,
    tokenizer: Tokenizer | None,
    *,
    chats: bool,
    rows: int,
) -> tuple[int, ...]:
    """Return all ids that end a text: of config.json, of generation_config.json, and the end of a turn in chats.

    Args:
      directories: where generation_config.json may be.
      fields: config.json.
      family: the family of the network.
      tokenizer: its tokenizer, or None.
      chats: whether the model has a chat template, so that its answers end as turns do.
      rows: the model's input rows.

    Raises:
      UserError: an id that is none of the model's rows, or a damaged file.
    """
    ids: list[int] = []
    stored = next((path / GENERATION_FILE for path in directories if (path / GENERATION_FILE).exists()), None)
    generation = {} if stored is None else schema.read_json(epath.Path(stored), dict[str, Any])
    for source, values in (("config.json", fields), (GENERATION_FILE, generation)):
        value = values.get("eos_token_id")
        for i in value if isinstance(value, list) else [] if value is None else [value]:
            if type(i) is not int or not 0 <= i < rows:
                raise UserError(
                    f"eos_token_id={untrusted.printable(repr(value))} must lie in [0, {rows}), the model's input rows; "
                    f"restore {source}"
                )
            ids.append(i)
    released = FAMILIES.get(family)
    if chats and released is not None and tokenizer is not None:
        turn_end = tokenizer.piece_id(released.pieces[-1])
        ids += [] if turn_end is None else [turn_end]
    return tuple(dict.fromkeys(ids))


def _stored_templates(directory: Path) -> dict[str, tuple[str, str]]:
    """Return the templates in a directory by name: where each is from, and its source."""
    limit = 4 * jinja_templates.MOST_SOURCE  # bytes
    file = directory / TEMPLATE_FILE
    if file.exists():
        sources = {"default": (TEMPLATE_FILE, untrusted.read_text(file, limit))}
        folder = directory / "additional_chat_templates"
        others = sorted(folder.glob("*.jinja")) if folder.is_dir() else []
        sources |= {other.stem: (f"{folder.name}/{other.name}", untrusted.read_text(other, limit)) for other in others}
        return {name: _checked(source, label) for name, (label, source) in sources.items()}
    if not (directory / SETTINGS_FILE).exists():
        return {}
    value = schema.read_json(epath.Path(directory / SETTINGS_FILE), dict[str, Any]).get("chat_template")
    entries = value if isinstance(value, list) else [] if value is None else [{"name": "default", "template": value}]
    sources = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise UserError(f"{SETTINGS_FILE} has a chat_template without a name; restore it")
        name = entry["name"]
        label = f"{SETTINGS_FILE}" + (f" ({untrusted.printable(name)[:100]})" if isinstance(value, list) else "")
        sources[name] = _checked(entry.get("template"), label)
    return sources


def _checked(source: Any, label: str) -> tuple[str, str]:
    if not isinstance(source, str):
        raise UserError(f"the chat template of {label} is {type(source).__name__}, not a text; restore it")
    if len(source) > jinja_templates.MOST_SOURCE:
        raise UserError(
            f"the chat template of {label} has {len(source):,} characters, more than {jinja_templates.MOST_SOURCE:,}; "
            "leave it out with --chat_template none"
        )
    return label, source


def _choose(sources: Mapping[str, tuple[str, str]], choice: str | None) -> tuple[str, str]:
    if choice is not None and choice not in sources:
        names = untrusted.printable(", ".join(sources))
        raise UserError(f"unknown chat_template {choice!r}; choose one of {names}, or none")
    if choice is None and "default" not in sources and len(sources) > 1:
        names = untrusted.printable(", ".join(sources))
        raise UserError(f"the model has several chat templates and no default; choose with --chat_template: {names}")
    return sources[choice or ("default" if "default" in sources else next(iter(sources)))]


def _special_tokens(directory: Path) -> dict[str, str]:
    """Return the special tokens that a template may write, by role."""
    roles = control_tokens(read_settings(epath.Path(directory)))
    return {role: text for role, text in roles.items() if text is not None and role.endswith("_token")}
