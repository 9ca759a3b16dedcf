"""Start a program with limits, or in namespaces of its own: a script of the standard library alone.

`python starter.py limited SPEC` sets limits and becomes the program. `python starter.py inside SPEC`, which bubblewrap
runs, also takes away the calls of the kernel by which memory would escape the limits. `python starter.py isolated SPEC`
does both, and first makes a sandbox from what Linux offers any user: new user, mount, process, network, IPC
and UTS namespaces, and a root directory of nothing but the interpreter and the program, all of it read-only.

Of three processes, the first stays outside, waits and is what its parent kills; the second is the init of the new
process namespace, with whose death the kernel kills everything in it; the third becomes the program, without any
privilege.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000, 0x20000000, 0x40000000
CLONE_NEWIPC, CLONE_NEWUTS, CLONE_NEWCGROUP = 0x8000000, 0x4000000, 0x2000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
MS_REC, MS_PRIVATE, MNT_DETACH = 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE = 1, 22, 24, 38, 41
SECCOMP_MODE_FILTER = 2
MOUNT_SETATTR, PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
LAST_CAP = 40  # CAP_CHECKPOINT_RESTORE
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's number of their kind (AUDIT_ARCH)
# The calls that a program may not make, by their numbers on these machines; `inotify_init` is one of x86_64 alone.
REFUSED = {
    # Memory that is part of no process: files without a name, and what System V and POSIX share between processes.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # Pages that stay in a pipe, and messages and files that stay in a socket, after their owner has let go of them.
    # What is left of sockets is `socketpair`, which an event loop of asyncio needs.
    "vmsplice": (278, 75),
    "socket": (41, 198),
    "bind": (49, 200),
    "setsockopt": (54, 208),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    # Objects of the kernel without a limit that holds here, which no solution of a problem needs.
    "io_setup": (206, 0),
    "timer_create": (222, 107),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "inotify_init": (253, 26),
    "inotify_init1": (294, 26),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "landlock_create_ruleset": (444, 444),
}
MMAP, FCNTL, PRCTL = (9, 222), (72, 25), (157, 167)
MAP_SHARED = 1  # in all kinds of shared mappings
# F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW and F_SETPIPE_SZ: a file holds any number of locks.
FCNTL_REFUSED = (6, 7, 37, 38, 1031)
PENDING_SIGNALS = 64
X32 = 0x40000000  # from here on x86_64 repeats its calls with other numbers
libc = ctypes.CDLL(None, use_errno=True)


def check(what: str, result: int) -> None:
    """Raise `OSError` if a call of libc failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def set_limits(limits: dict) -> None:
    """Limit this process and those that it starts."""
    values = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_SIGPENDING: PENDING_SIGNALS,
    }
    for which, value in values.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    # SIGXCPU ends a process and says why; one that ignores it has a second more.
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    most = limits["seconds"] + 1 if hard == resource.RLIM_INFINITY else min(limits["seconds"] + 1, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (min(limits["seconds"], most), most))


def forbid_hidden_memory() -> None:
    """Forbid this process and those that it starts the calls that give memory which no limit counts.

    Limits count the addresses of processes. Memory of the kernel that is in none of them has other limits or no limit,
    and a page of shared memory, or of a huge page, stays when its address is given back. A filter of the kernel
    (seccomp) refuses the calls that make such memory, and all calls of other kinds of programs, such as those of 32
    bits on x86_64, whose numbers mean something else.
    """
    check("prctl", libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))
    rules = filter_rules(os.uname().machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code))
    check("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check("seccomp", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0))


def filter_rules(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter as instructions of BPF: (operation, how many to skip if true, if false, operand)."""
    load, if_equal, if_at_least, if_any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow = (end, 0, 0, 0x00050000 | 1), (end, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ERRNO with EPERM, _ALLOW
    column = list(MACHINES).index(machine)
    rules = [(load, 0, 0, 4), (if_equal, 1, 0, MACHINES[machine]), refuse]  # seccomp_data.arch
    rules += [(load, 0, 0, 0), (if_at_least, 0, 1, X32), refuse]  # seccomp_data.nr
    for numbers in REFUSED.values():
        rules += [(if_equal, 0, 1, numbers[column]), refuse]
    by_argument = (
        (MMAP, 3, if_any_bit, (MAP_SHARED,)),
        (FCNTL, 1, if_equal, FCNTL_REFUSED),
        (PRCTL, 0, if_equal, (PR_SET_THP_DISABLE,)),
    )
    for numbers, argument, test, values in by_argument:
        last = len(values) - 1
        tests = [(test, last - i, int(i == last), value) for i, value in enumerate(values)]
        low_half = (load, 0, 0, 16 + 8 * argument)  # of seccomp_data.args
        rules += [(if_equal, 0, len(tests) + 3, numbers[column]), low_half, *tests, refuse, allow]
    return [*rules, allow]


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies."""
    check("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def become(spec: dict) -> None:
    """Become the program."""
    os.chdir(spec["directory"])
    os.closerange(3, 256)
    os.execve(spec["command"][0], spec["command"], spec["environment"])


def new_namespaces() -> None:
    """Put this process, as their root, into new namespaces; its next child is the first process of the new ones."""
    user, group, parent = os.geteuid(), os.getegid(), os.getpid()
    ready, go = os.pipe()
    if not (helper := os.fork()):  # only a process outside may map the ids of another user
        try:
            os.close(go)
            if not os.read(ready, 1):
                os._exit(1)
            write_maps(parent, user, group)
            os._exit(0)
        except BaseException as error:
            report(error)
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    check("unshare", libc.unshare(flags))
    os.write(go, b"x")
    os.close(go)
    os.close(ready)
    if os.waitpid(helper, 0)[1]:
        raise OSError("the ids of users cannot be mapped")


def write_maps(process: int, user: int, group: int) -> None:
    """Map the ids of a process in a new user namespace: of root, also nobody; of another user, only that user."""
    if user == 0:  # limits on processes do not hold for root, so the program must not be root outside either
        maps = {"uid_map": f"0 0 1\n{NOBODY} {NOBODY} 1", "gid_map": f"0 0 1\n{NOBODY} {NOBODY} 1"}
    else:
        maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
    for name, content in maps.items():
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(content)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount."""
    words = [word.encode() if word else None for word in (source, target, kind)]
    check(f"mount {target}", libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None))


def bind(source: str, target: str, device: bool = False) -> None:
    """Show a file or directory of the host, read-only and with all that is mounted below it."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, "", MS_BIND | MS_REC)
    if device:
        return
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    check(f"mount_setattr {target}", result)


def make_root(spec: dict) -> None:
    """Make a root directory in memory, and leave the host's."""
    root = spec["root"]
    os.umask(0o022)  # the program is another user than root, who makes its directories
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=32m,nr_inodes=1000,mode=755")
    for source, target in spec["links"]:
        os.makedirs(os.path.dirname(root + target), exist_ok=True)
        os.symlink(source, root + target)
    for path in spec["read_only"]:
        bind(path, root + path)
    for name in spec["devices"]:
        bind(name, root + name, device=True)
    with open(spec["program"], "rb") as file:
        program = file.read()
    work = root + spec["directory"]
    os.makedirs(work)
    with open(f"{work}/program.py", "wb") as file:
        file.write(program)
    os.chmod(f"{work}/program.py", 0o644)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:  # no namespaces in these
        file.write("0")
    os.chdir(root)
    check("pivot_root", libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."))
    check("umount", libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def drop_privileges() -> None:
    """Give up all privileges in the namespaces, for good."""
    for capability in range(LAST_CAP + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def reap(child: int) -> int:
    """Wait until a child ends, and for whatever else does; return its exit code."""
    while True:
        try:
            ended, status = os.wait()
        except InterruptedError:
            continue
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def isolate(spec: dict) -> int:
    """Run the program in a sandbox; return its exit code."""
    new_namespaces()
    alive, go = os.pipe()
    if not (init := os.fork()):
        try:
            os.close(go)
            die_with_parent()
            if not os.read(alive, 1):  # the parent died before
                os._exit(1)
            make_root(spec)
            if not (program := os.fork()):
                os.setsid()
                drop_privileges()
                set_limits(spec["limits"])
                forbid_hidden_memory()
                become(spec)
            os._exit(reap(program))
        except BaseException as error:
            report(error)
    os.write(go, b"x")
    return reap(init)


def report(error: BaseException) -> None:
    """End this process, and say why."""
    os.write(2, f"sandbox: {error}\n".encode())
    os._exit(127)


def main() -> None:
    """Do what the command line says."""
    mode, spec = sys.argv[1], json.loads(sys.argv[2])
    try:
        if mode == "isolated":
            die_with_parent()
            os._exit(isolate(spec))
        set_limits(spec["limits"])
        if mode == "inside":
            forbid_hidden_memory()
        become(spec)
    except BaseException as error:
        report(error)


if __name__ == "__main__":
    main()
