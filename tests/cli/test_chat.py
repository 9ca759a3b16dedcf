"""The verb `chat`: messages and commands, in a terminal and in a pipe."""

import io
import json
import sys

import pytest
from support import tiny_chat
from support.command_line import assert_one_line
from support.slow_cases import thinned

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.cli.chat import COMMANDS, Terminal
from diffusionlm.console import KEPT, Console
from diffusionlm.pretrained import conversation
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
    piped(monkeypatch, f"/system S\nHi\n/set temperature 0.5 seed 4\n/save {file}\nYou\n/save\n")
    assert cli.main(["chat", path, *SETTINGS]) == 0
    dialogue = Conversation(model, SAMPLING, system="S")
    first = dialogue.ask("Hi")
    dialogue.sampling = SamplingConfig(length=6, steps=3, temperature=0.5, seed=4)
    second = dialogue.ask("You")
    assert capsys.readouterr().out == printed(first, second)
    saved = json.loads(file.read_text())
    assert [turn["content"] for turn in saved["messages"]] == ["S", "Hi", first, "You", second]
    piped(monkeypatch, "And?\n")
    assert cli.main(["chat", path, "--load", str(file)]) == 0
    assert capsys.readouterr().out == printed(dialogue.ask("And?"))


def test_options_replace_the_settings_of_a_file(path, model, monkeypatch, tmp_path, capsys):
    dialogue = Conversation(model, SamplingConfig(length=6, temperature=5.0, block_length=3))
    dialogue.ask("Hi")
    dialogue.save(tmp_path / "dialogue.json")
    piped(monkeypatch, "You\n")
    assert cli.main(["chat", path, "--load", str(tmp_path / "dialogue.json"), "--length=4", "--temperature", "0"]) == 0
    dialogue.sampling = SamplingConfig(length=4, temperature=0.0, block_length=3)  # 0 is also the default
    assert capsys.readouterr().out == printed(dialogue.ask("You"))


def test_a_file_is_read_once(path, model, monkeypatch, tmp_path, capsys):
    dialogue, file = Conversation(model, SAMPLING), tmp_path / "dialogue.json"
    dialogue.ask("Hi")
    dialogue.save(file)
    read, reads = conversation.read, []
    monkeypatch.setattr(conversation, "read", lambda name: reads.append(name) or read(name))
    piped(monkeypatch, "/save\n")
    assert cli.main(["chat", path, "--load", str(file)]) == 0
    assert reads == [str(file)]
    assert capsys.readouterr().err == f"loaded 2 messages from {file}\nsaved 2 messages to {file}\n"
    piped(monkeypatch, f"/load {file}\n")
    assert cli.main(["chat", path, *SETTINGS]) == 0
    assert len(reads) == 2


def test_a_file_is_read_before_the_model(tmp_path, capsys):
    assert cli.main(["chat", str(tmp_path / "no model"), "--load", str(tmp_path / "none.json")]) == 2
    assert_one_line(capsys.readouterr(), ["No such file", "none.json"])


def test_another_answer_takes_the_place_of_the_last(path, model, monkeypatch, tmp_path, capsys):
    file = tmp_path / "dialogue.json"
    piped(monkeypatch, f"Hi\n/regenerate\n/set temperature 5\n/regenerate\n/save {file}\n/reset\nHi\n")
    assert cli.main(["chat", path, *SETTINGS]) == 0
    dialogue = Conversation(model, SAMPLING)
    answers = [dialogue.ask("Hi"), dialogue.regenerate()]
    dialogue.sampling = SamplingConfig(length=6, steps=3, temperature=5.0)
    answers.append(dialogue.regenerate())
    dialogue.reset()
    answers.append(dialogue.ask("Hi"))
    captured = capsys.readouterr()
    assert captured.out == printed(*answers) and answers[0] == answers[1] != answers[2] != answers[3]
    assert captured.err.count("the same answer; with temperature=0") == 1
    assert json.loads(file.read_text())["messages"][1]["content"] == answers[2]


@pytest.mark.parametrize(
    "line, parts",
    thinned(
        [
            ("/xyzzy", ["'/xyzzy'", "known: help, load", "begins with a slash, type two"]),
            ("/regenrate", ["'/regenrate'", "did you mean 'regenerate'?"]),
            ("/set temprature 1", ["unknown setting 'temprature'", "did you mean 'temperature'?"]),
            ("/set help me", ["unknown setting 'help'"]),
            ("/set length 7 steps", ["names and values"]),
            ("/set length 64", ["length=64 leaves no room"]),
            ("/reset all", ["/reset takes no argument, and 'all'"]),
            ("/", ["unknown command '/'"]),
            ("/set temperature hot", ["temperature=hot", "a number"]),
            ("/set temperature -1", ["temperature=-1.0", "from 0"]),
            ("/set strategy best", ["'best'"]),
            ("/set temperature", ["needs names and values"]),
            ("/regenerate", ["no answer yet"]),
            ("/save", ["needs the name of a file"]),
            ("/save {here}", ["exists", "another name"]),
            ("/load", ["needs the name of a file"]),
            ("/load {tmp}/none.json", ["No such file", "/none.json"]),
            ("/save {tmp}/none/file", ["No such file", "/none/file"]),
            ("/save {tmp}/dangling", ["exists", "another name"]),
            ("x" * 100, ["105 tokens", "context of 64", "length=6"]),
        ],
        every=2,
    ),
)
def test_a_mistake_is_one_line_and_ends_a_pipe(line, parts, path, monkeypatch, tmp_path, capsys):
    here = tmp_path / "here"
    here.write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
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
    assert_one_line(capsys.readouterr(), ["no chat template", "fine-tune it (docs/sft.md)"])


def test_a_person_is_told_of_mistakes_and_goes_on(model, monkeypatch, tmp_path, capsys):
    piped(monkeypatch, f"/nothing\n/save {tmp_path}/none/file\n/set help me\n /help\nHi\n/settings\nYou\\\n")
    terminal = Terminal(Conversation(model, SAMPLING), interactive=True)
    assert terminal.run() == 0
    captured = capsys.readouterr()
    assert [line.split(": ")[1] for line in captured.err.splitlines()] == ["error"] * 3
    assert len(terminal.dialogue.turns) == 2  # a message that the end of the input cuts is dropped
    assert printed(terminal.dialogue.turns[1].content) in captured.out and "temperature 0.0" in captured.out
    assert all(f"/{name}" in captured.out for name in COMMANDS)


class Interrupted(Conversation):
    """A dialogue whose answers are interrupted after a step."""

    def stream(self, text):
        yield next(super().stream(text))
        raise KeyboardInterrupt

    def stream_again(self):
        yield next(super().stream_again())
        raise KeyboardInterrupt


def test_ctrl_c_drops_an_answer_and_not_the_dialogue(model, capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=5)
    dialogue = Interrupted(model, SAMPLING)
    dialogue.ask("Hi")
    before = list(dialogue.turns)
    terminal = Terminal(dialogue, console, interactive=True)
    for line in ("You", "/regenerate"):
        terminal.line(line)
        assert dialogue.turns == before
        captured = capsys.readouterr()
        assert captured.err == "(stopped; the dialogue is as it was before)\n" and captured.out == ""


def test_ctrl_c_between_messages_says_how_to_leave(model, monkeypatch, capsys):
    lines = iter([KeyboardInterrupt, EOFError])

    def interrupted(prompt):
        raise next(lines)

    monkeypatch.setattr("builtins.input", interrupted)
    assert Terminal(Conversation(model, SAMPLING), interactive=True).run() == 0
    assert "Ctrl-D or /quit ends the dialogue" in capsys.readouterr().err


def test_a_terminal_shows_the_denoising_and_then_the_answer(model):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=40, height=5, color_system=None)
    terminal = Terminal(Conversation(model, SAMPLING), console, interactive=True)
    terminal.line("Hi")
    animation, _, rest = file.getvalue().rpartition("\x1b[2K")  # the last line that is erased
    assert "░░░░░░" in animation and "░" not in rest
    assert rest == printed(terminal.dialogue.turns[1].content)


def test_turns_that_no_longer_fit_are_named_once(model, capsys):
    terminal = Terminal(Conversation(model, SAMPLING), interactive=True)
    for k in range(4):
        terminal.line(f"question {k}")
    errors = capsys.readouterr().err.splitlines()
    assert terminal.dialogue.forgotten > 0
    assert errors[-1] == f"(the oldest {terminal.dialogue.forgotten} turns no longer fit into the context)"
    assert len(set(errors)) == len(errors)
