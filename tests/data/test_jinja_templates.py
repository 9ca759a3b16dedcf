"""Chat templates of released models: their ids are those of the library, and what people type stays text."""

import json

import pytest
import tokenizers as library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tokenizer_files import END, train_byte_level

from diffusionlm.data import chat_templates, jinja_templates, tokenizers
from diffusionlm.data.chat_templates import Message
from diffusionlm.data.jinja_templates import JinjaTemplate
from diffusionlm.errors import UserError
from diffusionlm.interop import chats

PIECES = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
# As LLaDA-8B-Instruct releases it (arXiv 2502.09992).
LLADA = JinjaTemplate(
    "a test",
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    {"bos_token": "<|startoftext|>"},
)
DIALOGUE = [
    Message("system", "Be brief."),
    Message("user", " Who are you?\n"),
    Message("assistant", "A model."),
    Message("user", "Bye"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer with the control tokens of LLaDA and Dream."""
    trained = train_byte_level()
    trained.add_special_tokens(PIECES)
    directory = tmp_path_factory.mktemp("tokenizer")
    trained.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": "<|startoftext|>"}))
    return tokenizers.load(str(directory))


def test_llada_s_ids_are_those_of_its_published_form(tokenizer):
    """Written out by hand: marks are single tokens, and the texts between them are encoded as they stand."""
    start, header, end, eot = (tokenizer.piece_id(piece) for piece in PIECES[:4])
    question, answer = tokenizer.encode("\n\nWho are you?"), tokenizer.encode("\n\n")
    user, assistant = tokenizer.encode("user"), tokenizer.encode("assistant")
    expected = [start, header, *user, end, *question, eot, header, *assistant, end, *answer]
    assert LLADA.prompt_ids([DIALOGUE[1]], tokenizer) == expected
    # The template of fine-tuning is an implementation of its own.
    assert chat_templates.choose("llada", tokenizer).prompt_ids([DIALOGUE[1]], tokenizer) == expected


@pytest.mark.parametrize("dialogue", [DIALOGUE[1:2], DIALOGUE[:2], DIALOGUE])
def test_the_template_that_a_family_published_is_that_of_its_release(tokenizer, dialogue):
    own = JinjaTemplate("ours", chats.FAMILIES["llada"].source, {})
    assert own.prompt_ids(dialogue, tokenizer) == LLADA.prompt_ids(dialogue, tokenizer)


def test_dream_s_own_template_is_that_of_qwen(data_dir):
    """The ids of Qwen2.5's tokenizer, which Dream has."""
    qwen = tokenizers.load_directory(f"{data_dir}/tokenizers/qwen2")
    own = JinjaTemplate("ours", chats.FAMILIES["dream"].source, {})
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    asked = [151644, 872, 198, 9707, 1879, 151645, 198, 151644, 77091, 198]
    assert own.prompt_ids([Message("user", "Hello world")], qwen) == system + asked
    with open(f"{data_dir}/tokenizers/qwen2/tokenizer_config.json") as file:
        released = JinjaTemplate("released", json.load(file)["chat_template"], {})
    assert released.prompt_ids([Message("user", "Hello world")], qwen) == system + asked


@pytest.mark.parametrize("text", ["a", " b \n", "\u00e9\U0001f600", "<|im_en", "", "x\ty"])
def test_without_typed_control_tokens_the_ids_are_those_of_the_library(tokenizer, text):
    dialogue = [DIALOGUE[0], Message("user", text)]
    plain = library.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    assert LLADA.prompt_ids(dialogue, tokenizer) == plain.encode(LLADA.render(dialogue), add_special_tokens=False).ids


TYPED = st.lists(st.sampled_from([*PIECES, END, "<|eot_id", "a", " b", "\n", "\U000f0000", "\u00e9"]), max_size=8).map(
    "".join
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TYPED)
def test_control_tokens_that_are_typed_into_a_message_stay_text(tokenizer, text):
    """The prompt has the control tokens of the template alone, and its text is the template's around the message's."""
    ids = LLADA.prompt_ids([Message("user", text)], tokenizer)
    controls = {tokenizer.piece_id(piece) for piece in tokenizer.controls}
    start, header, end, eot = (tokenizer.piece_id(piece) for piece in PIECES[:4])
    assert [i for i in ids if i in controls] == [start, header, end, eot, header, end]
    content = ids[ids.index(end) + 1 : ids.index(eot)]
    assert tokenizer.decode(content, inside=True) == "\n\n" + text.strip()


def test_a_template_travels_as_data(tokenizer):
    values = json.loads(json.dumps(LLADA.to_dict()))
    assert jinja_templates.from_dict(values) == LLADA
    native = chat_templates.choose("plain", tokenizer)
    assert jinja_templates.from_dict(native.to_dict()) == native


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 9}, "a chat template of version 9, and this diffusionlm knows 1 and 2: upgrade"),
        ({"version": 1}, "the chat template is damaged"),
        ({"source": 3}, "source"),
        ({"source": "a" * (1 << 19)}, "source"),
        ({"tokens": {"bos_token": None}}, "tokens"),
        ({"extra": 1}, "extra"),
    ],
)
def test_damaged_templates_are_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        jinja_templates.from_dict(LLADA.to_dict() | change)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('roles must\nalternate') }}", r"a test, refuses them: roles must\\nalternate"),
        ("{{ messages[9].content.x }}", "refuses them: .* has no element 9"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "does not end"),
    ],
)
def test_messages_that_a_template_refuses_are_one_line(tokenizer, source, message):
    with pytest.raises(ValueError, match=message) as error:
        JinjaTemplate("a test", source, {}).prompt_ids(DIALOGUE, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["{% for", "{{ 1 | center(9) }}", "{% nothing %}"])
def test_a_template_that_cannot_be_compiled_is_one_line(source):
    with pytest.raises(UserError, match="the chat template, a test, cannot be read: ") as error:
        jinja_templates.require_readable(JinjaTemplate("a test", source, {}))
    assert "\n" not in str(error.value)
