"""Programs that take memory of the kernel, which the limits of a process do not count."""

import errno
import os

import pytest
from support.sandboxes import CTYPES
from support.slow_cases import thinned

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
