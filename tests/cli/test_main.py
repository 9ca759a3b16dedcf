"""The command: exit codes, help, and what is printed on stderr."""

import errno
import logging
import re

import pytest
from support.command_line import assert_one_line

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.options import fields


def verb_that_raises(error):
    def verb(args, prog):
        raise error

    return verb


@pytest.mark.parametrize(
    "error, code, part",
    [
        (UserError("one\ntwo"), 2, "one two"),
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere"), 2, "No space left on device: /somewhere"),
        (PermissionError(errno.EACCES, "Permission denied", "/somewhere"), 2, "Permission denied: /somewhere"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_verb_raises_becomes_one_line(error, code, part, monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "train", verb_that_raises(error))
    assert cli.main(["train"]) == code
    assert_one_line(capsys.readouterr(), [part])


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug")])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "train", verb_that_raises(error))
    with pytest.raises(type(error), match="a bug"):
        cli.main(["train"])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffusionlm {dlm.__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_the_verbs(args, capsys):
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{verb} +\S.*\.$", out, re.MULTILINE) for verb in cli.VERBS)


def test_help_of_a_family_lists_its_verbs(capsys):
    assert cli.main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data prepare" in out and "data inspect" in out and "experiments" not in out


@pytest.mark.parametrize("command", ["train demo", "sample", "data prepare", "data inspect", "experiments"])
def test_help_explains_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert cli.main([*command.split(), "--help"]) == 0
    captured = capsys.readouterr()
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", captured.out).split())
    names = re.findall(r"--([a-z]\w*(?:\.\w+)*) (?!, )", text)
    if command == "train demo":
        assert set(fields(Config)) <= set(names)
    for name in set(names) - {"help"}:
        described = re.search(rf"--{name} (?:\S+ )?(?P<help>.*?)(?P<end>\(default: |\(required\))", text)
        assert len(described["help"]) > 3, f"{name} has no help"
    assert captured.err == ""


def test_help_shows_the_defaults_of_the_experiment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert cli.main(["train", "demo_arm", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--model\.causal \{True,False\}[^-]*\(default: True\)", out)
    assert re.search(rf"--model\.d_model INT[^-]*\(default: {dlm.experiment('demo_arm').model.d_model}\)", out)


def test_warnings_of_ours_and_of_jax_are_shown_and_others_are_not(capsys):
    handler = cli.StderrHandler()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        logging.getLogger("diffusionlm.parallel.mesh").warning("axis %s\ndropped", "fsdp")
        logging.getLogger("jax._src.xla_bridge").warning("falling back to cpu")
        logging.getLogger("orbax.thing").warning("noise")
        logging.getLogger("orbax.thing").error("broken")
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().err == (
        "diffusionlm: warning: axis fsdp dropped\n"
        "diffusionlm: warning: falling back to cpu\n"
        "diffusionlm: error: broken\n"
    )


def test_the_program_tells_the_allocator_to_keep_freed_memory_before_anything_else(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append("keep_freed_memory"))
    monkeypatch.setattr(cli, "main", lambda argv: calls.append("main") or 0)
    monkeypatch.setattr(cli, "never_deaf", lambda: None)  # it would judge the signals of all later tests
    monkeypatch.setattr(cli, "StderrHandler", logging.NullHandler)
    monkeypatch.setattr("sys.warnoptions", ["default"])  # the filters of the tests stay
    handlers = list(logging.getLogger().handlers)
    try:
        with pytest.raises(SystemExit) as end:
            cli.entry_point()
    finally:
        logging.getLogger().handlers[:] = handlers
    assert end.value.code == 0 and calls == ["keep_freed_memory", "main"]
