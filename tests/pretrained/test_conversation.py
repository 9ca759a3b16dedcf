"""Dialogues: what the model reads, what is added, what no longer fits, and the file that keeps them."""

import dataclasses
import json
import re

import pytest
from support import tiny_chat

import diffusionlm as dlm
from diffusionlm.data import chat_templates
from diffusionlm.data.chat_templates import Message
from diffusionlm.data.jinja_templates import JinjaTemplate
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.pretrained.conversation import Conversation
from diffusionlm.sampling.config import CHAT, SamplingConfig

SAMPLING = SamplingConfig(length=6, steps=3, temperature=0.7)
LOW_CONFIDENCE = dataclasses.replace(SAMPLING, strategy="low_confidence")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dlm.load(tiny_chat.save(tmp_path_factory.mktemp("chat") / "model"))


@pytest.fixture
def dialogue(model):
    return Conversation(model, SAMPLING)


def answer(model, messages, **settings):
    return model.generate(messages=messages, sampling=LOW_CONFIDENCE, **settings)[0].text


def test_an_answer_has_read_the_whole_dialogue(model, dialogue):
    first = dialogue.ask("Hi")
    assert first == answer(model, [Message("user", "Hi")])
    second = dialogue.ask("2+2?")
    turns = [Message("user", "Hi"), Message("assistant", first), Message("user", "2+2?")]
    assert second == answer(model, turns)
    assert dialogue.messages == dialogue.turns == [*turns, Message("assistant", second)] and dialogue.forgotten == 0
    dialogue.reset()
    assert dialogue.messages == [] and dialogue.ask("Hi") == first


def test_the_system_message_is_read_before_all_turns(model):
    dialogue = Conversation(model, SAMPLING, system="No.")
    system, question = Message("system", "No."), Message("user", "Hi")
    assert dialogue.ask("Hi") == answer(model, [system, question])
    assert dialogue.messages[:2] == [system, question]
    dialogue.system = None
    assert dialogue.messages[0] == question


def test_an_answer_that_was_not_watched_to_its_end_is_not_added(model, dialogue):
    drafts = dialogue.stream("Hi")
    first = next(drafts)
    assert first.step == 0 and all(first.masked) and first.text == ""
    assert dialogue.turns == []
    others = list(drafts)
    masks = [sum(draft.masked) for draft in (first, *others)]
    assert masks == [6, 4, 2, 0] and others[-1].text == dialogue.turns[1].content == answer(model, [dialogue.turns[0]])


def test_the_oldest_turns_are_left_out_if_all_do_not_fit(model):
    dialogue = Conversation(model, SAMPLING, system="S")
    for k in range(4):  # a turn takes 2 + 10 + 1 tokens of the 64, and an answer up to 2 + 6 + 1
        dialogue.ask(f"question {k}")
    assert 0 < dialogue.forgotten < 6 and dialogue.forgotten % 2 == 0 and len(dialogue.turns) == 8
    read = [Message("system", "S"), *dialogue.turns[dialogue.forgotten : -1]]
    more = [Message("system", "S"), *dialogue.turns[dialogue.forgotten - 2 : -1]]
    assert len(model.encode_messages(read)) <= 64 - 6 < len(model.encode_messages(more))
    assert dialogue.turns[-1].content == answer(model, read)


@pytest.mark.parametrize(
    "text, message", [("x" * 60, "the message has 65 tokens in the template"), (" ", "an empty message")]
)
def test_a_message_without_an_answer_changes_nothing(dialogue, text, message):
    dialogue.ask("Hi")
    before = list(dialogue.turns)
    with pytest.raises(UserError, match=message) as error:
        dialogue.ask(text)
    assert "\n" not in str(error.value) and dialogue.turns == before


def test_another_answer_replaces_the_last(model, dialogue):
    with pytest.raises(UserError, match="there is no answer yet"):
        dialogue.regenerate()
    dialogue.ask("Hi")
    dialogue.ask("You")
    history = dialogue.turns[:3]
    for repeat in (1, 2):
        assert dialogue.regenerate() == dialogue.turns[-1].content
        assert dialogue.turns == [*history, Message("assistant", answer(model, history, seed=repeat))]
    assert dialogue.ask("And?") == answer(model, [*dialogue.turns[:4], Message("user", "And?")])


@pytest.mark.slow
def test_an_autoregressive_model_answers_from_left_to_right(tmp_path):
    model = dlm.load(tiny_chat.save(tmp_path / "model", objective="arm"))
    dialogue = Conversation(model, SamplingConfig(length=6, block_length=4, temperature=0.0))
    messages = [Message("user", "Hi")]
    assert dialogue.ask("Hi") == model.generate(messages=messages, length=6, temperature=0.0)[0].text


def test_settings_are_checked_where_they_are_set(model, dialogue):
    for sampling, message in (
        (SamplingConfig(temperature=-1.0), "temperature=-1.0"),
        (SamplingConfig(length=64), "length=64 leaves no room for a message in the model's context of 64"),
        (SamplingConfig(length=6, cache="causal"), "cache=causal"),
    ):
        with pytest.raises(UserError, match=message):
            dialogue.sampling = sampling
    assert dialogue.sampling == LOW_CONFIDENCE


@pytest.mark.parametrize(
    "template, text, message",
    [
        ("{{ raise_exception('no system') if messages[0].role == 'system' }}a:", "S", "no system"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}a:", "S", "no place for a system"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}a:", "\udc80", "content of messages"),
    ],
)
def test_a_system_message_that_cannot_be_written_is_refused_at_once(model, template, text, message):
    model = dataclasses.replace(
        model, sidecar=dataclasses.replace(model.sidecar, template=JinjaTemplate("a test", template, {}).to_dict())
    )
    dialogue = Conversation(model, SAMPLING)
    with pytest.raises(UserError, match=message):
        dialogue.system = text
    assert dialogue.system is None
    with pytest.raises(UserError, match=message):
        Conversation(model, SAMPLING, system=text)


def test_an_answer_that_imitates_the_template_is_named(model):
    plain = chat_templates.choose("plain", ByteTokenizer())
    model = dataclasses.replace(model, sidecar=dataclasses.replace(model.sidecar, template=plain.to_dict()))
    dialogue = Conversation(model, SAMPLING)
    dialogue.turns = [Message("user", "a"), Message("assistant", "b\n### user\nc")]
    with pytest.raises(UserError, match="an earlier answer cannot be read again; regenerate it, or reset"):
        dialogue.ask("d")
    with pytest.raises(UserError, match="a text holds the line '### user'"):
        dialogue.ask("### user")
    assert dialogue.regenerate() == dialogue.turns[-1].content


def test_an_answer_of_before_a_change_is_dropped(dialogue):
    drafts = dialogue.stream("a")
    next(drafts)
    dialogue.ask("b")
    turns = list(dialogue.turns)
    with pytest.raises(UserError, match="the dialogue has changed"):
        list(drafts)
    assert dialogue.turns == turns


def test_a_model_without_a_template_is_refused(tmp_path):
    model = dlm.load(tiny_chat.save(tmp_path / "model", template=None))
    with pytest.raises(UserError, match="no chat template") as error:
        Conversation(model)
    assert "\n" not in str(error.value)


def test_a_saved_dialogue_goes_on(model, dialogue, tmp_path):
    path = tmp_path / "dialogue.json"
    dialogue.sampling = SamplingConfig(length=5, strategy="random", eos_penalty=float("inf"), seed=3)
    dialogue.system = "S"
    dialogue.ask("Hi")
    dialogue.regenerate()
    dialogue.save(path)
    other = Conversation(model, SAMPLING)
    other.load(path)
    assert (other.messages, other.sampling) == (dialogue.messages, dialogue.sampling)
    assert other.regenerate() == dialogue.regenerate()
    assert other.ask("You") == dialogue.ask("You")
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "S"}


def test_settings_that_a_file_does_not_name_are_those_of_chat(model, tmp_path):
    path = tmp_path / "dialogue.json"
    path.write_text('{"version": 1, "messages": [], "sampling": {"length": 9}, "repeats": 0}')
    dialogue = Conversation(model, SAMPLING)
    dialogue.load(path)
    assert dialogue.sampling == dataclasses.replace(CHAT, length=9, strategy="low_confidence")


HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "version=2"),
        ({"messages": HI[:1]}, "its last message is of the user"),
        ({"messages": [*HI, *HI[:1], *HI]}, "turn 4 is of the role 'user'"),
        ({"messages": [*HI, {"role": "system", "content": "S"}]}, "turn 3 is of the role 'system'"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "Invalid enum value 'tool'"),
        ({"messages": [{"role": "user"}]}, "missing required field `content`"),
        ({"sampling": {"lenght": 3}}, "unknown sampling setting 'lenght'; did you mean 'length'?"),
        ({"sampling": {"length": "3"}}, "length='3'"),
        ({"sampling": {"strategy": "inf"}}, "unknown strategy 'inf'"),
        ({"sampling": {"temperature": -1}}, "temperature=-1"),
        ({"sampling": {"length": 100}}, "length=100 leaves no room"),
        ({"repeats": -1}, "repeats=-1"),
        ({"extra": 1}, "unknown field `extra`"),
    ],
)
def test_a_damaged_file_is_one_line_and_changes_nothing(dialogue, change, message, tmp_path):
    path = tmp_path / "dialogue.json"
    dialogue.ask("Hi")
    dialogue.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = (dialogue.messages, dialogue.sampling)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        dialogue.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert (dialogue.messages, dialogue.sampling) == before
