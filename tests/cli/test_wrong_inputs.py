"""Every option that takes a path, with every kind of path that is none: one line on stderr and exit code 2."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest
from support import wrong_paths
from support.command_line import assert_one_line
from support.slow_cases import slow_but

from diffusionlm import storage
from diffusionlm.cli import main as cli

# {wrong} is the path; what else a command needs exists.
READING = [
    "train {wrong}.py:mine",
    "train demo --workdir {tmp}/w --data.path {wrong}",
    "train demo --workdir {tmp}/w --run.init_from {wrong}",
    "sample {wrong}",
    "chat {wrong}",
    "sample x --prompt_file {wrong}",
    "evaluate {wrong} perplexity --data {tmp}/file",
    "import {wrong} --output {tmp}/out",
    "export {wrong} --format llama --output {tmp}/out",
    "compile {wrong}.py:mine --topology v5e-4",
    "data prepare {wrong} --output {tmp}/out --sequence_length 8 --tokenizer byte --no_progress",
    "data prepare {text} --validation {wrong} --output {tmp}/out --sequence_length 8 --tokenizer byte --no_progress",
    "data prepare {text} --output {tmp}/out --sequence_length 8 --tokenizer {wrong} --no_progress",
    "data inspect {wrong}",
    "experiments {wrong}.py:mine",
    "sweep plan {wrong}.py:mine",
    "sweep report isoflop_cpu --workdir {wrong}",
]
WRITING = [
    "train demo --workdir {wrong} --data.path {tmp}/missing",
    "sample x --html {wrong}",
    "import {source} --output {wrong}",
    "data prepare {text} --output {wrong} --sequence_length 8 --tokenizer byte --no_progress --workers 1",
    "sweep run isoflop_cpu --workdir {wrong} --data.path {tmp}/missing",
]
EMPTY_IS_THE_DEFAULT = ("--data.path {wrong}", "--run.init_from {wrong}", "--workdir {wrong}")


def crossed(commands, kinds):
    """Return every command with every kind of path; slow but for one kind a command, and all kinds of the last."""
    cases = []
    for i, command in enumerate(commands):
        for j, kind in enumerate(kinds):
            quick = (j - i) % len(kinds) == 0 or command == commands[-1]
            cases.append(pytest.param(command, kind, marks=() if quick else pytest.mark.slow))
    return cases


@pytest.fixture
def places(tmp_path):
    """Return the paths of the commands above, by name, but for the wrong one."""
    wrong_paths.make(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}\n" for i in range(99)))
    return {"tmp": tmp_path, "text": text, "source": tmp_path / "empty"}


def check(command, wrong, places, capsys):
    args = [word.format(wrong=wrong, **places) for word in command.split()]
    with wrong_paths.within(60):
        code = cli.main(args)
    captured = capsys.readouterr()
    assert_one_line(captured, [])
    wrong_paths.assert_shown_as_it_is(captured.err)
    assert code == 2 and len(captured.err) < 2100
    made = set(os.listdir(places["tmp"])) - {"file", "loop", "dangling", "pipe", "empty", "text.txt"}
    assert made <= {"w"}  # a run directory is owned before its data is looked at


@pytest.mark.parametrize(("command", "kind"), crossed(READING, wrong_paths.UNREADABLE))
def test_a_path_that_cannot_be_read_is_one_line(command, kind, places, capsys):
    if kind == "nothing" and command.endswith(EMPTY_IS_THE_DEFAULT):
        pytest.skip("an empty text is the default")
    check(command, wrong_paths.UNREADABLE[kind](places["tmp"]), places, capsys)


@pytest.mark.parametrize(("command", "kind"), crossed(WRITING, wrong_paths.NOWHERE))
def test_a_path_that_cannot_be_written_is_one_line(command, kind, places, capsys):
    check(command, wrong_paths.NOWHERE[kind](places["tmp"]), places, capsys)


def run(words, *, redirect="", **environment):
    """Run the command in a shell, with redirected streams."""
    line = f"exec {sys.executable} -m diffusionlm {words} {redirect}"
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, env=os.environ | environment, timeout=60, check=False
    )


def test_a_full_disk_behind_stdout_is_one_line_and_exit_code_2():
    done = run("experiments", redirect=">/dev/full")
    assert done.returncode == 2
    assert done.stderr == b"diffusionlm: error: No space left on device: standard output\n"


@pytest.mark.parametrize("redirect", slow_but([">&-", "2>&-", "<&-", ">&- 2>&- <&-"], (">&-", ">&- 2>&- <&-")))
def test_a_stream_that_the_caller_closed_changes_nothing(redirect):
    done = run("experiments demo --json", redirect=redirect)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"" if ">&-" in redirect.split() else json.loads(done.stdout)["name"] == "demo"


def test_an_encoding_without_a_character_shows_its_escape():
    done = run("train d\u00e9mo", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"d\\xe9mo" in done.stderr


def test_a_reader_that_has_gone_is_no_error():
    done = run("experiments", redirect="| true")
    assert done.stderr == b""


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.EBUSY, errno.ENOSPC])
def test_a_write_that_fails_names_its_file(number, tmp_path, monkeypatch):
    """The errors of a network file system, which come without a name, in the middle of a write."""

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError) as error:
        storage.write_atomically(tmp_path / "file", "content")
    assert error.value.filename == str(tmp_path / "file") and not os.listdir(tmp_path)
    monkeypatch.setitem(cli.VERBS, "train", lambda *args: storage.write_atomically(tmp_path / "file", "content"))
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(["train"]) == 2
    assert stream.getvalue() == f"diffusionlm: error: {os.strerror(number)}: {tmp_path / 'file'}\n"
