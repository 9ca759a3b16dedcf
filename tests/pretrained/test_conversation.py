"""Dialogues: what the model reads, what is added, what no longer fits, and the file that keeps them."""

import json
import re

import pytest
from support import tiny_chat

import diffusionlm as dlm
from diffusionlm.data.chat_templates import Message
from diffusionlm.errors import UserError
from diffusionlm.pretrained.conversation import Conversation
from diffusionlm.sampling.config import SamplingConfig

SAMPLING = SamplingConfig(length=6, steps=3, strategy="low_confidence", temperature=0.7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dlm.load(tiny_chat.save(tmp_path_factory.mktemp("chat") / "model"))


@pytest.fixture
def dialogue(model):
    return Conversation(model, SAMPLING)


def answer(model, messages, **settings):
    return model.generate(messages=messages, sampling=SAMPLING, **settings)[0].text


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


@pytest.mark.parametrize("text, said", [("x" * 60, "65 tokens in its template"), (" ", "an empty message")])
def test_a_message_without_an_answer_changes_nothing(dialogue, text, said):
    dialogue.ask("Hi")
    before = list(dialogue.turns)
    with pytest.raises(UserError, match=said) as error:
        dialogue.ask(text)
    assert "\n" not in str(error.value) and dialogue.turns == before


def test_another_answer_replaces_the_last(model, dialogue):
    with pytest.raises(UserError, match="there is no answer yet"):
        dialogue.regenerate()
    dialogue.ask("Hi")
    dialogue.ask("You")
    history = dialogue.turns[:3]
    for repeat in (1, 2):
        list(dialogue.regenerate())
        assert dialogue.turns == [*history, Message("assistant", answer(model, history, seed=repeat))]
    assert dialogue.ask("And?") == answer(model, [*dialogue.turns[:4], Message("user", "And?")])


def test_without_a_strategy_it_is_that_of_llada(model):
    settings = Conversation(model).sampling
    assert (settings.strategy, settings.length, settings.block_length) == ("low_confidence", 128, 32)


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
    dialogue.save(path)
    other = Conversation(model)
    other.load(path)
    assert (other.messages, other.sampling) == (dialogue.messages, dialogue.sampling)
    assert other.ask("You") == dialogue.ask("You")
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"version": 2}, "version=2"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "the roles user; they must be user and assistant"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "Invalid enum value 'tool'"),
        ({"messages": [{"role": "user"}]}, "missing required field `content`"),
        ({"sampling": {"lenght": 3}}, "unknown sampling setting 'lenght'"),
        ({"sampling": {"length": "3"}}, "length='3'"),
        ({"sampling": {"temperature": -1}}, "temperature=-1"),
        ({"extra": 1}, "unknown field `extra`"),
    ],
)
def test_a_damaged_file_is_one_line_and_changes_nothing(dialogue, change, said, tmp_path):
    path = tmp_path / "dialogue.json"
    dialogue.ask("Hi")
    dialogue.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = (dialogue.messages, dialogue.sampling)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        dialogue.load(path)
    assert "\n" not in str(error.value) and (dialogue.messages, dialogue.sampling) == before
