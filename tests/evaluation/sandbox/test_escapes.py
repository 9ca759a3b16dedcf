"""Programs that try to get out of a sandbox: what they reach for, what they see, and whom they can talk to."""

import errno
import os
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest
from support.sandboxes import FORK_BOMB, HUGE_FILE, MEMORY_BOMB, PATIENT, attempt, call, open_sandbox, usable_python
from support.slow_cases import thinned

from diffusionlm.evaluation.sandbox import backends, run
from diffusionlm.evaluation.sandbox.backends import Job

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
    "a memory bomb": MEMORY_BOMB,
    "a huge file": HUGE_FILE,
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
