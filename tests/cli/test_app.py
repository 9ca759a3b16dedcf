"""The verb `app`: what is refused before the model is loaded, and what the page begins with."""

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from support.command_line import assert_one_line

from diffusionlm.app import server
from diffusionlm.cli import app as verb
from diffusionlm.cli.main import main

MODEL = str(Path(__file__).parents[2] / "docs/results/models/tinystories")
# The command, whose standard input becomes the terminal of its session, so that Ctrl-C is a signal.
IN_A_TERMINAL = """
import os, signal, sys
os.open(os.ttyname(0), os.O_RDWR)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell ignores in what it runs in the background
os.execv(sys.executable, [sys.executable, "-m", "diffusionlm", *sys.argv[1:]])
"""


@pytest.fixture
def served(monkeypatch):
    """Serve nothing: return the list of what would have been served, and how."""
    calls = []
    monkeypatch.setattr(server, "require_gradio", lambda: None)
    monkeypatch.setattr(server, "serve", lambda *arguments: calls.append(arguments[:-1]))
    monkeypatch.setattr(verb, "load_model", lambda checkpoint: checkpoint)
    return calls


@pytest.mark.parametrize("module, package", [("gradio", "gradio"), ("PIL", "pillow")])
def test_a_missing_package_is_named_with_its_extra_before_the_model_is_loaded(module, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", sys)  # so that it is not imported here
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["app", "nowhere"]) == 2
    assert_one_line(capsys.readouterr(), [f"app needs the package {package}", ".[app]"])


def test_only_the_settings_that_are_given_replace_those_of_the_page(served, monkeypatch):
    monkeypatch.setattr(server, "find_port", lambda host, port: port or server.FIRST_PORT)
    assert main(["app", "model"]) == 0
    assert main(["app", "model", "--port", "8000", "--host", "0.0.0.0", "--top_p", "0.5", "--length=8"]) == 0
    assert served == [
        ("model", {}, "127.0.0.1", server.FIRST_PORT),
        ("model", {"top_p": 0.5, "length": 8}, "0.0.0.0", 8000),
    ]


def test_a_port_that_is_taken_is_refused_and_left_out_of_the_search(served, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert main(["app", "nowhere", "--port", str(taken)]) == 2
        assert_one_line(capsys.readouterr(), [f"port={taken}", "in use", "--port"])
        monkeypatch.setattr(server, "FIRST_PORT", taken)
        assert taken < server.find_port("127.0.0.1", None) < taken + server.PORTS


def test_an_address_of_another_machine_is_refused(served, capsys):
    """203.0.113.9 is of a block that is reserved for documentation (RFC 5737)."""
    assert main(["app", "nowhere", "--host", "203.0.113.9"]) == 2
    assert_one_line(capsys.readouterr(), ["host='203.0.113.9'", "--host"])


def test_nothing_is_reported_to_others_and_the_environment_is_as_it_was(monkeypatch):
    """Gradio reads the variable when it is imported and launched; Hugging Face's hub has another."""
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), server.workplace() as directory:
        assert (os.environ["GRADIO_ANALYTICS_ENABLED"], os.environ["HF_HUB_DISABLE_TELEMETRY"]) == ("False", "1")
        assert Path(os.environ["GRADIO_TEMP_DIR"]).is_relative_to(directory) and directory.is_dir()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # which the signal ends
    assert dict(os.environ) == before and not directory.exists()
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_served_page_ends_quietly_and_leaves_nothing_behind(number, tmp_path):
    """A terminal of its own runs the command, in which Ctrl-C is typed."""
    pytest.importorskip("gradio", reason="the app needs its extra: gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, "app", MODEL, "--port", str(port)],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    os.close(inside)
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while read := os.read(terminal, 2**16):
            served = b"Ctrl-C ends it" in output
            output += read
            if not served and b"Ctrl-C ends it" in output:
                urllib.request.urlopen(f"http://127.0.0.1:{port}").close()
                os.write(terminal, b"\x03") if number == signal.SIGINT else process.send_signal(number)
    os.close(terminal)
    said = output.decode().partition("The app is at ")[2].splitlines()
    assert process.wait() == 0
    assert said[0] == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)" and set(said[1:]) <= {"", "^C"}
    assert not list(tmp_path.iterdir())
