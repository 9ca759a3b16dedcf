"""The verb `chat`: messages and commands, in a terminal and in a pipe."""

import io
import json
import sys

import pytest
from support import tiny_chat
from support.command_line import assert_one_line

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.cli.chat import COMMANDS, Terminal
from diffusionlm.console import KEPT, Console
from diffusionlm.pretrained.conversation import Conversation
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.untrusted import printable

SETTINGS = ["--length", "6", "--steps", "3", "--block_length", "0"]
SAMPLING = SamplingConfig(length=6, steps=3, temperature=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(path):
    return dlm.load(path)


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def printed(*texts):
    """Return lines as the command prints them: characters that would move the cursor are escaped."""
    return "".join(f"{printable(text, KEPT)}\n" for text in texts)


def test_each_line_of_a_pipe_is_answered(path, model, monkeypatch, capsys):
    piped(monkeypatch, "Hi\n\nYou \\\nand I\n//no command\n/quit\nnever\n")
    assert cli.main(["chat", path, *SETTINGS]) == 0
    dialogue = Conversation(model, SAMPLING)
    answers = [dialogue.ask(text) for text in ("Hi", "You \nand I", "/no command")]
    assert capsys.readouterr().out == printed(*answers)


def test_a_dialogue_is_saved_and_goes_on(path, model, monkeypatch, tmp_path, capsys):
    file = tmp_path / "dialogue.json"
    piped(monkeypatch, f"/system S\nHi\n/set temperature 0.5\n/set seed 4\n/save {file}\nYou\n/save\n")
    assert cli.main(["chat", path, *SETTINGS]) == 0
    dialogue = Conversation(model, SAMPLING, system="S")
    first = dialogue.ask("Hi")
    dialogue.sampling = SamplingConfig(length=6, steps=3, temperature=0.5, seed=4, strategy="low_confidence")
    second = dialogue.ask("You")
    assert capsys.readouterr().out == printed(first, second)
    saved = json.loads(file.read_text())
    assert [turn["content"] for turn in saved["messages"]] == ["S", "Hi", first, "You", second]
    piped(monkeypatch, "And?\n")
    assert cli.main(["chat", path, "--load", str(file)]) == 0
    assert capsys.readouterr().out == printed(dialogue.ask("And?"))


def test_another_answer_takes_the_place_of_the_last(path, model, monkeypatch, tmp_path, capsys):
    file = tmp_path / "dialogue.json"
    piped(monkeypatch, f"Hi\n/regenerate\n/set temperature 5\n/regenerate\n/save {file}\n/reset\nHi\n")
    assert cli.main(["chat", path, *SETTINGS]) == 0
    hot = SamplingConfig(length=6, steps=3, temperature=5.0, strategy="low_confidence")
    question = [{"role": "user", "content": "Hi"}]
    greedy = Conversation(model, SAMPLING).ask("Hi")
    other, again = (model.generate(messages=question, sampling=hot, seed=seed)[0].text for seed in (2, 0))
    captured = capsys.readouterr()
    assert captured.out == printed(greedy, greedy, other, again)
    assert captured.err.count("the same answer; with temperature=0") == 1
    assert json.loads(file.read_text())["messages"][1]["content"] == other


@pytest.mark.parametrize(
    "line, parts",
    [
        ("/rest", ["'/rest'", "did you mean 'reset'?", "two slashes"]),
        ("/set temprature 1", ["'temprature'", "did you mean 'temperature'?"]),
        ("/set temperature hot", ["temperature=hot", "a number"]),
        ("/set temperature -1", ["temperature=-1.0", "from 0"]),
        ("/set strategy best", ["'best'"]),
        ("/set temperature", ["needs a name and a value"]),
        ("/regenerate", ["no answer yet"]),
        ("/save", ["needs the name of a file"]),
        ("/save {here}", ["exists", "another name"]),
        ("/load", ["needs the name of a file"]),
        ("/load {tmp}/none.json", ["No such file"]),
        ("x" * 100, ["105 tokens", "context of 64", "length=6"]),
    ],
)
def test_a_mistake_is_one_line_and_ends_a_pipe(line, parts, path, monkeypatch, tmp_path, capsys):
    here = tmp_path / "here"
    here.write_text("mine")
    piped(monkeypatch, line.format(here=here, tmp=tmp_path) + "\nnever\n")
    assert cli.main(["chat", path, *SETTINGS]) == 2
    assert_one_line(capsys.readouterr(), parts)
    assert here.read_text() == "mine"


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--load", "a", "--system", "S"], ["load='a'", "excludes --system"]),
        (["--temperature", "-1"], ["temperature=-1.0"]),
        (["--lenght", "3"], ["did you mean 'length'?"]),
    ],
)
def test_a_mistaken_option_is_one_line(words, parts, path, monkeypatch, capsys):
    piped(monkeypatch, "")
    assert cli.main(["chat", path, *words]) == 2
    assert_one_line(capsys.readouterr(), parts)


def test_a_model_that_has_not_learnt_to_answer_is_refused(tmp_path, capsys):
    assert cli.main(["chat", tiny_chat.save(tmp_path / "model", template=None)]) == 2
    assert_one_line(capsys.readouterr(), ["no chat template", "fine-tune it on dialogues"])


def test_a_person_is_told_of_mistakes_and_goes_on(model, monkeypatch, capsys):
    piped(monkeypatch, "/nothing\nHi\n/help\n/settings\n")
    terminal = Terminal(Conversation(model, SAMPLING), interactive=True)
    assert terminal.run() == 0
    captured = capsys.readouterr()
    assert captured.err.count("error: unknown command '/nothing'") == 1
    assert printed(terminal.dialogue.turns[1].content) in captured.out and "temperature 0.0" in captured.out
    assert all(f"/{name}" in captured.out for name in COMMANDS)


def test_ctrl_c_drops_an_answer_and_not_the_dialogue(model, monkeypatch, capsys):
    terminal = Terminal(Conversation(model, SAMPLING), interactive=True)
    terminal.line("Hi")
    before = list(terminal.dialogue.turns)

    def interrupted():
        yield next(terminal.dialogue.stream("You"))
        raise KeyboardInterrupt

    terminal.show(interrupted())
    assert terminal.dialogue.turns == before and "stopped" in capsys.readouterr().err


def test_a_terminal_shows_the_denoising_and_keeps_the_answer(model, capsys):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=40, height=5, color_system=None)
    terminal = Terminal(Conversation(model, SAMPLING), console, interactive=True)
    terminal.line("Hi")
    shown = file.getvalue()
    assert "░░░░░░" in shown and "░░░░\n" not in capsys.readouterr().out
    assert shown.count("\x1b[2K") > 2  # the animation erases its lines, and the answer is printed after it
