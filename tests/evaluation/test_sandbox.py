"""Programs that try to get out of a sandbox, or to take a machine down from inside; and its command lines."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from support.slow_cases import slow_but, thinned

from diffusionlm.errors import UserError
from diffusionlm.evaluation import sandbox
from diffusionlm.evaluation.sandbox import backends, run
from diffusionlm.evaluation.sandbox.backends import Job, Layout, Limits
from diffusionlm.evaluation.sandbox.run import Outcome, Sandbox

PATIENT = Limits(seconds=60, clock=300)
SHORT, HASTY = Limits(seconds=1, clock=300), Limits(seconds=60, clock=3)
CTYPES = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def attempt(code, *errors):
    """A program that says "escaped" if `code` gets to its end, and "held" for one of these errors."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    return (
        f"try:\n{body}    print('escaped')\nexcept ({', '.join(errors or ['OSError'])}) as e:\n    print('held', e)\n"
    )


def call(code):
    """A program that says "escaped" if an expression with `libc` is not negative, and "held" otherwise."""
    return CTYPES + f"print('escaped' if ({code}) >= 0 else 'held')"


FORK_BOMB = attempt("import os\nwhile True:\n    os.fork()")
THREADS = "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
ATTEMPTS = {
    "network": attempt("import socket\nsocket.create_connection(('1.1.1.1', 53), 5)"),
    "network, datagrams": attempt("import socket\nsocket.socket(2, 2).sendto(b'x', ('1.1.1.1', 53))"),
    "reading /etc/passwd": attempt("open('/etc/passwd').read()"),
    "reading the home directory": attempt("import os\nassert os.listdir(HOME) != SEEN", "OSError", "AssertionError"),
    "reading a file of the host": attempt("open(SECRET).read()"),
    "reading the environment of init": attempt("open('/proc/1/environ').read()"),
    "reading devices of memory": attempt("open('/dev/mem', 'rb').read(1)"),
    "writing a file of the host": attempt("open(SECRET, 'w').write('x')"),
    "writing to the root": attempt("open('/x', 'w')"),
    "writing to the libraries": attempt("import os\nopen(os.path.realpath(os.__file__), 'a').write('x')"),
    "deleting a library": attempt("import os\nos.unlink(os.path.realpath(os.__file__))"),
    "a symbolic link out": attempt("import os\nos.symlink(SECRET, 'link')\nopen('link').read()"),
    "a symbolic link to write through": attempt("import os\nos.symlink('/', 'up')\nopen('up/x', 'w')"),
    "parent directories": attempt("open('../' * 20 + SECRET.lstrip('/')).read()"),
    "a hard link to a library": attempt("import os\nos.link(os.path.realpath(os.__file__), 'own')"),
    "a fork bomb": FORK_BOMB,
    "a bomb of threads": attempt(THREADS, "RuntimeError"),
    "a memory bomb": attempt("x = []\nwhile True:\n    x.append(bytearray(1 << 26))", "MemoryError"),
    "a huge file": attempt("f = open('f', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))"),
    "many open files": attempt("x = []\nwhile True:\n    x.append(open('program.py'))"),
    "a file without a name": attempt("import os\nos.memfd_create('x')"),
    "becoming root": attempt("import os\nos.setuid(0)"),
    "another root directory": attempt("import os\nos.chroot('/work')"),
    "a device": attempt("import os\nos.mknod('d', 0o060666, os.makedev(8, 0))"),
    "namespaces of its own": call("libc.unshare(0x10000000)"),
    "a mount of its own": call("libc.mount(b'none', b'/work', b'tmpfs', 0, None)"),
    "libraries mounted again to write": call("libc.mount(b'none', b'/usr/lib', None, ctypes.c_ulong(4128), None)"),
    "a descriptor left open": attempt("import os\nfor fd in range(3, 250):\n    os.fstat(fd)"),
    "processes of the host": attempt("import os\nos.kill(HOST, 9)"),
    "an abstract socket of the host": attempt("import socket\nsocket.socket(1, 1).connect(chr(0) + NAME)"),
}


def usable_python():
    """An interpreter that the sandboxes can show: bubblewrap runs as nobody where the tests run as root."""
    own = backends.layout().python
    if os.geteuid() == 0 and os.path.exists("/usr/bin/python3") and own.startswith("/root/"):
        return "/usr/bin/python3"
    return own


def open_sandbox(name, limits=PATIENT):
    place = Sandbox(name, backends.layout(usable_python() if name == "bubblewrap" else None), limits)
    if (reason := run.why_not(Sandbox(name, place.layout))) is not None:
        pytest.skip(f"{name} does not work here: {reason}")
    return place


@pytest.fixture(scope="module", params=slow_but(backends.SANDBOXES, ("namespaces",)))
def place(request):
    return open_sandbox(request.param)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Make what programs reach for, and check at the end that nothing happened to it."""
    secret = tmp_path_factory.mktemp("host") / "secret.txt"
    secret.write_text("the secret")
    name = f"diffusionlm-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as listener, open(secret) as file:
        os.set_inheritable(file.fileno(), True)
        listener.bind("\0" + name)
        listener.listen()
        values = {"SECRET": str(secret), "HOST": os.getpid(), "NAME": name, "HOME": str(Path.home()), "SEEN": []}
        yield "".join(f"{key} = {value!r}\n" for key, value in values.items())
    assert secret.read_text() == "the secret" and list(secret.parent.iterdir()) == [secret]


@pytest.mark.parametrize("name", thinned(ATTEMPTS, every=2))
def test_an_escape_fails(name, place, host):
    code = ATTEMPTS[name]
    # Of the interpreter's own path in it, a home directory may hold some.
    shown = [path for path in place.layout.read_only if path.startswith(f"{Path.home()}/")]
    first = sorted({Path(path).relative_to(Path.home()).parts[0] for path in shown})
    outcome = place.run(f"{host}SEEN = {first!r}\n{code}")
    assert outcome.ending == "exit" and "escaped" not in outcome.output and "held" in outcome.output, outcome
    assert "the secret" not in outcome.output


# Calls of the kernel by their numbers, on x86_64 also as programs of other kinds have them: shmget, memfd_create,
# memfd_secret, semget, msgget, mq_open; io_uring_setup, io_setup, bpf, perf_event_open, userfaultfd, add_key,
# request_key, keyctl, inotify_init1, fanotify_init, landlock_create_ruleset, vmsplice, socket, timer_create.
HIDDEN = {
    "x86_64": (
        *(29, 319, 447, 64, 68, 240, (1 << 30) + 29, (1 << 30) + 319, (1 << 30) + 64),
        *(425, 206, 321, 298, 323, 248, 249, 250, 294, 300, 444, 278, 41, 222),
    ),
    "aarch64": (194, 279, 447, 190, 186, 180, 425, 0, 280, 241, 282, 217, 218, 219, 26, 262, 444, 75, 198, 107),
}


def test_no_memory_escapes_the_limits(place):
    """Memory that is part of no process and of no directory would be limited by nothing."""
    calls = [f"libc.syscall({number}, 0, 1 << 20, 0o1600)" for number in HIDDEN[os.uname().machine]]
    calls += ["libc.memfd_create(b'x', 0)", "libc.shmget(0, 1 << 20, 0o1600)", "libc.prctl(41, 0, 0, 0, 0)"]
    outcome = place.run(CTYPES + "".join(f"print({code}, ctypes.get_errno())\n" for code in calls))
    assert outcome.ending == "exit"
    for line in outcome.output.splitlines():
        assert line.split() == ["-1", str(errno.EPERM)], outcome
    assert outcome.output.count("\n") == len(calls)
    assert place.run(CTYPES + "print(libc.prctl(42, 0, 0, 0, 0))").output == "1\n"  # PR_GET_THP_DISABLE


CHECKED = """\
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
def checked(result):
    if result in (-1, 2**64 - 1, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""
# Programs that take memory of the kernel, each 1 MiB or more, beyond the limits on addresses, files and processes.
HOARDS = {
    "semaphores of System V": "for _ in range(20):\n    checked(libc.semget(0, 32000, 0o600))",
    "messages of System V": """\
for _ in range(64):
    queue = checked(libc.msgget(0, 0o600))
    for _ in range(2):
        checked(libc.msgsnd(queue, ctypes.create_string_buffer((1).to_bytes(8, sys.byteorder), 8200), 8192, 0))
""",
    "a page that keeps its shared mapping": """\
size = 1 << 24
for flags in (0x21, 0x21, 0x21):
    address = checked(libc.mmap(None, size, 3, flags, -1, 0))
    ctypes.memset(address, 1, size)
    libc.munmap(address + 4096, size - 4096)
""",
    "a page that keeps its mapping of /dev/zero": """\
size, zero = 1 << 24, os.open("/dev/zero", os.O_RDWR)
address = checked(libc.mmap(None, size, 3, 1, zero, 0))
ctypes.memset(address, 1, size)
libc.munmap(address + 4096, size - 4096)
""",
    "files without content": "for i in range(4000):\n    os.close(os.open(str(i), os.O_CREAT | os.O_WRONLY))",
    "a file in no directory": "os.write(os.open('.', os.O_TMPFILE | os.O_RDWR), bytes(1 << 21))",
    "locks on ranges of a file": """\
import fcntl
file = open("program.py")
for i in range(6000):
    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 2 * i)
""",
    "the buffer of a pipe": "import fcntl\nfcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
    "messages of senders that are gone": """\
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind(chr(0) + "receiver")
for _ in range(8):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes(1 << 17), chr(0) + "receiver")
""",
    "the buffer of a socket": "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)",
    "files that are on their way": """\
for _ in range(16):
    ends = socket.socketpair()
    ends[0].send(bytes(1 << 16))
    socket.send_fds(ends[1], [b"x"], [ends[0].fileno()])
""",
    "timers": "for _ in range(4000):\n    checked(libc.timer_create(1, None, ctypes.create_string_buffer(8)))",
    "waiting signals": """\
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {40})
for _ in range(4000):
    checked(libc.sigqueue(os.getpid(), 40, None))
""",
}


@pytest.mark.parametrize("name", thinned(HOARDS, every=2))
def test_no_memory_of_the_kernel_is_hoarded(name, place):
    body = "".join(f"    {line}\n" for line in HOARDS[name].splitlines())
    end = "except OSError as e:\n    print('held', e.errno)\nelse:\n    print('escaped')\n"
    outcome = place.run(f"{CHECKED}try:\n{body}{end}")
    allowed = (errno.EPERM, errno.EROFS, *((errno.EAGAIN,) if name == "waiting signals" else ()))
    assert outcome.ending == "exit" and outcome.output in [f"held {number}\n" for number in allowed], outcome


def test_what_solutions_need_is_not_refused(place):
    """An event loop has a pair of sockets, threads have stacks, and big collections have private mappings."""
    code = """\
import asyncio, fcntl, os, threading
async def double(x):
    await asyncio.sleep(0)
    return 2 * x
print(asyncio.run(double(4)), fcntl.fcntl(0, fcntl.F_GETFD), len(bytearray(1 << 27)))
thread = threading.Thread(target=print, args=("a thread",))
thread.start()
thread.join()
"""
    outcome = place.run(code)
    assert outcome == ("exit", 0, f"8 0 {1 << 27}\na thread\n")


def test_init_is_out_of_reach():
    """Try it in namespaces of our own; in bubblewrap, what the program may trace is bubblewrap itself, inside."""
    assert open_sandbox("namespaces").run(call("libc.ptrace(16, 1, 0, 0)")).output == "held\n"


def test_namespaces_work_without_privileges(tmp_path):
    """Make the sandbox as nobody where the tests run as root; elsewhere all tests show it."""
    python = usable_python()
    if os.geteuid() != 0 or python.startswith("/root/") or not os.access("/proc/sys/user", os.R_OK):
        pytest.skip("the tests run as an ordinary user, or no interpreter is readable for one")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        root, path, starter = (Path(directory) / name for name in ("root", "program.py", "starter.py"))
        root.mkdir()
        codes = [call("libc.unshare(0x20000)"), FORK_BOMB, "import os; print(os.getuid(), os.listdir('/'))"]
        starter.write_bytes(Path(backends.STARTER).read_bytes())
        for code, expected in zip(codes, ("held", "held", "65534 ["), strict=True):
            path.write_text(code)
            layout = backends.layout(python)
            job = Job(str(path), str(root), PATIENT, layout, backends.NOBODY, backends.NOBODY)
            command = [str(starter) if word == backends.STARTER else word for word in backends.namespaces(job)]
            streams = (subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT)
            with run.session(command, str(root), backends.NOBODY, *streams) as process:
                outcome = run._outcome(process, process.stdout, PATIENT)
            assert outcome.ending == "exit" and outcome.output.startswith(expected), outcome


def test_the_libraries_are_read_only_whoever_owns_them(place):
    code = "import os\ntry:\n    os.chmod(os.__file__, 0o777)\nexcept OSError as e:\n    print(e.errno)"
    assert place.run(code).output == f"{errno.EROFS}\n"


def test_a_program_sees_nothing_of_our_environment(place, monkeypatch):
    monkeypatch.setenv("API_KEY", "the secret")
    outcome = place.run("import os; print(sorted(os.environ)); print(os.getuid(), os.getgroups())")
    names, ids = outcome.output.splitlines()
    assert set(eval(names)) <= {"HOME", "LANG", "PATH", "PWD", "PYTHONHASHSEED", "TMPDIR"}
    assert ids.split()[0] == "65534"


def test_a_program_can_read_its_directory_and_not_write_it(place):
    outcome = place.run("import os\nprint(os.getcwd(), 'program.py' in os.listdir())\nopen('a', 'w')")
    assert outcome.output.startswith("/work True\n") and f"[Errno {errno.EROFS}]" in outcome.output


def test_a_program_reads_nothing_from_our_input(place):
    assert place.run("import sys; print(repr(sys.stdin.read()))").output == "''\n"


def test_two_programs_talk_and_see_nothing_else_of_each_other(place):
    """One is in no process table, no directory and no network of the other."""
    asking = "print('hello', flush=True)\nraise SystemExit(input())"
    answering = "import os\nassert input() == 'hello'\nprint(sorted(os.listdir()))\nos.kill(-1, 9)"
    outcome = place.converse(answering, asking)
    files = ["program.py", "starter.py"] if place.name == "bubblewrap" else ["program.py"]
    assert outcome == ("exit", 1, f"{files}\n")


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


def running(word):
    """The processes of the machine with a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


DAEMON = """\
import os, sys
if not os.fork():
    os.setsid()
    if not os.fork():
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(100)", WORD])
"""


def test_no_process_outlives_its_program(place):
    word = uuid.uuid4().hex
    start = time.monotonic()
    assert place.run(f"WORD = {word!r}\n{DAEMON}import time; time.sleep(0.5)").ending == "exit"
    assert time.monotonic() - start < 50
    wait_until(lambda: not running(word))


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
        assert "held" in place.run(ATTEMPTS["a memory bomb"]).output
        assert "held" in place.run(ATTEMPTS["a huge file"]).output
        assert place.run("while True: print('x' * 1000)").ending == "output"

    def test_what_it_started_is_killed_with_it(self):
        word = uuid.uuid4().hex
        code = (
            f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', {word!r}])"
        )
        limits = Limits(seconds=60, clock=300, processes=100_000)  # of all processes of the user
        assert Sandbox("unprotected", backends.layout(), limits).run(code).code == 0
        wait_until(lambda: not running(word))


JOB = Job(
    program="/tmp/p.py",
    directory="/tmp/root",
    limits=Limits(seconds=7, clock=8, memory=64 << 20, processes=3, file=2 << 20, open_files=9),
    layout=Layout("/opt/bin/python", ("/opt/bin/python", "/opt/lib"), (("usr/lib", "/lib"),)),
    user=1000,
    group=100,
)


def pairs(words, option, count=2):
    return [tuple(words[i + 1 : i + 1 + count]) for i, word in enumerate(words) if word == option]


def test_the_command_line_of_bubblewrap():
    words = backends.bubblewrap(JOB)
    options, command = words[: words.index("--")], words[words.index("--") + 1 :]
    for kind in ("user", "pid", "net", "ipc", "uts"):
        assert f"--unshare-{kind}" in options
    assert {"--die-with-parent", "--new-session", "--clearenv", "--disable-userns"} <= set(options)
    assert pairs(options, "--cap-drop", 1) == [("ALL",)]
    shown = [("/opt/bin/python",) * 2, ("/opt/lib",) * 2, ("/tmp/p.py", "/work/program.py")]
    assert set(pairs(options, "--ro-bind")) == {*shown, (backends.STARTER, "/work/starter.py")}
    assert not {"--bind", "--dev", "--proc", "--share-net", "--setenv"} & set(options)
    assert pairs(options, "--dev-bind") == [(path, path) for path in ("/dev/null", "/dev/zero", "/dev/urandom")]
    assert "--tmpfs" not in options and options[-4:] == ["--remount-ro", "/", "--chdir", "/work"]
    assert command[0] == "/opt/bin/python" and command[-2] == "inside"
    spec = json.loads(command[-1])
    assert spec["limits"] == {
        "seconds": 7,
        "clock": 8,
        "memory": 64 << 20,
        "processes": 3,
        "file": 2 << 20,
        "open_files": 9,
        "output": 1 << 20,
    }
    assert spec["command"] == ["/opt/bin/python", "-s", "-P", "-B", "/work/program.py"]
    assert spec["environment"]["HOME"] == "/work"


def test_a_layout_shows_the_interpreter_and_libraries_alone():
    layout = backends.layout()
    prefix = Path(layout.python).parents[1]
    for path in layout.read_only:
        assert path == layout.python or Path(path) in (prefix / "lib", prefix / "lib64") or path in backends.LIBRARIES


def test_the_first_sandbox_that_works_is_taken(monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda place: "it is broken" if place.name == "bubblewrap" else None)
    assert sandbox.find(allow_code_execution=False).name == "namespaces"
    assert sandbox.find(allow_code_execution=True).name == "namespaces"
    monkeypatch.setattr(run, "why_not", lambda place: None)
    assert sandbox.find(allow_code_execution=False).name == "bubblewrap"


def test_without_a_sandbox_nothing_runs_unless_it_is_allowed(monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda place: f"no {place.name}")
    reasons = "bubblewrap: no bubblewrap; namespaces: no namespaces.*--allow_code_execution"
    with pytest.raises(UserError, match=reasons) as error:
        sandbox.find(allow_code_execution=False)
    assert "\n" not in str(error.value)
    assert sandbox.find(allow_code_execution=True).name == "unprotected"


def test_a_sandbox_that_cannot_be_made_says_why(monkeypatch):
    monkeypatch.setattr(Sandbox, "run", lambda self, program: Outcome("exit", 1, "bwrap: no\npermissions\n"))
    assert run.why_not(Sandbox("namespaces", backends.layout())) == "bwrap: no permissions"
    monkeypatch.setenv("PATH", "")
    assert run.why_not(Sandbox("bubblewrap", backends.layout())) == "bwrap is not installed"
