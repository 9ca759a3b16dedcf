"""Every program ends, with all that it started, and says how."""

import os
import subprocess
import sys
import time
import uuid

import pytest
from support.sandboxes import DAEMON, HASTY, HUGE_FILE, MEMORY_BOMB, PATIENT, SHORT, open_sandbox, running, wait_until

from diffusionlm.evaluation.sandbox import backends
from diffusionlm.evaluation.sandbox.backends import Limits
from diffusionlm.evaluation.sandbox.run import Sandbox


@pytest.mark.slow
def test_the_end_of_one_program_ends_the_dialogue(place):
    start = time.monotonic()
    assert place.converse("", "print(repr(input()))").output.endswith("EOFError: EOF when reading a line\n")
    assert place.converse("while True: pass", "raise SystemExit(4)") == ("exit", 4, "")
    assert time.monotonic() - start < PATIENT.clock
    hasty = Sandbox(place.name, place.layout, HASTY)
    assert hasty.converse("while True: pass", "input()").ending == "late"
    short = Sandbox(place.name, place.layout, SHORT)
    assert short.converse("while True: pass", "input()").ending == "time"
    assert short.converse("while True: pass", "try: input()\nexcept EOFError: pass") == ("exit", 0, "")
    assert hasty.converse("", "import os\nwhile True: os.write(2, bytes(1 << 16))").ending == "output"


def test_no_process_outlives_its_program(place):
    word = uuid.uuid4().hex
    start = time.monotonic()
    assert place.run(f"WORD = {word!r}\n{DAEMON}import time; time.sleep(0.5)").ending == "exit"
    assert time.monotonic() - start < 50
    wait_until(lambda: not running(word))


KILLS = (
    "import os\nfor pid in (os.getppid(), 1, -1):\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass"
)


def test_killing_everything_kills_nothing_else(place):
    with subprocess.Popen(["sleep", "100"]) as bystander:
        assert place.run(f"{KILLS}\nprint('done')").ending == "exit"
        assert bystander.poll() is None
        bystander.kill()


IGNORE = "import signal\nfor s in set(signal.Signals) - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\n"
CLOSE = "import os\nos.close(1)\nos.close(2)\n"


@pytest.mark.parametrize("code", [IGNORE, *(pytest.param(code, marks=pytest.mark.slow) for code in ("", CLOSE))])
def test_an_endless_loop_ends(code, place):
    outcome = Sandbox(place.name, place.layout, Limits(seconds=60, clock=1)).run(f"{code}while True: pass")
    assert (outcome.ending, outcome.code) == ("late", None)
    outcome = Sandbox(place.name, place.layout, SHORT).run(f"{code}while True: pass")
    assert (outcome.ending, outcome.code) == (("exit", 128 + 9) if code == IGNORE else ("time", None))


def test_endless_output_ends(place):
    limits = Limits(seconds=60, clock=300, output=1 << 16)
    outcome = Sandbox(place.name, place.layout, limits).run("while True: print('x' * 1000)")
    assert outcome.ending == "output" and len(outcome.output) == 1 << 16


def test_the_exit_code_is_the_programs(place):
    assert place.run("raise SystemExit(3)").code == 3
    assert place.run("import os; os.abort()").code == 134


def test_a_sandbox_ends_with_us():
    """A process that is killed while a program runs leaves nothing behind."""
    open_sandbox("namespaces")
    word = uuid.uuid4().hex
    program = f"WORD = {word!r}\n{DAEMON}import time; time.sleep(100)"
    code = f"from diffusionlm.evaluation import sandbox; sandbox.run.find(allow_code_execution=False).run({program!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        wait_until(lambda: running(f"time.sleep(100)\0{word}"))
        process.kill()
        process.wait()
    wait_until(lambda: not [pid for pid in running(word) if pid != str(os.getpid())])


class TestUnprotected:
    """Without a sandbox there are limits, a clean environment and an end, and no more than that."""

    @pytest.mark.slow
    def test_it_ends(self, monkeypatch):
        monkeypatch.setenv("API_KEY", "the secret")
        place = Sandbox("unprotected", backends.layout(), HASTY)
        assert place.run("while True: pass").ending == "late"
        place = Sandbox("unprotected", backends.layout(), PATIENT)
        assert "the secret" not in place.run("import os; print(dict(os.environ))").output
        assert "held" in place.run(MEMORY_BOMB).output
        assert "held" in place.run(HUGE_FILE).output
        assert place.run("while True: print('x' * 1000)").ending == "output"

    def test_what_it_started_is_killed_with_it(self):
        word = uuid.uuid4().hex
        code = (
            f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', {word!r}])"
        )
        limits = Limits(seconds=60, clock=300, processes=100_000)  # of all processes of the user
        assert Sandbox("unprotected", backends.layout(), limits).run(code).code == 0
        wait_until(lambda: not running(word))
