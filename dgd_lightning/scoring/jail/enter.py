"""Stand-alone program: runs one command in namespaces and limits of its own, and sees that nothing of it outlives it.

    warden (this process, outside) ─► init (process 1 of a process namespace of its own) ─► the command, without powers

It reads one line of JSON from stdin (`Order`), writes one line when the command has started, one when all is over. The
command ends when stdin is closed (so also when whoever started the warden dies), when it exits, or at a limit. Where the
kernel allows no namespaces, the warden itself is the parent, adopts orphans and kills all descendants at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

libc = ctypes.CDLL(None, use_errno=True)
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
APART = NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_RECURSIVE, DETACH = 442, 0x8000, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
NOBODY = 65534
HOME = "/sandbox"  # inside a root of its own
LINUX = sys.platform == "linux"


class Order(NamedTuple):
    """What to run, and how."""

    argv: list[str]
    env: dict[str, str]
    fds: list[int]  # become 3, 4 … of the command, in this order
    namespaces: bool
    visible: list[str]  # paths it can read, where namespaces are on
    folder: str | None  # its working folder, where they are off
    cpu_seconds: int
    wall_seconds: float
    memory_mb: int
    processes: int
    disk_mb: int


def call(name: str, *args: Any) -> int:
    """A C function; raises OSError."""
    result = getattr(libc, name)(*args)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument, where there is such a thing."""
    if LINUX:
        libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    call("mount", source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data.encode())


def leave_namespaces() -> None:
    """Leave the namespaces of network, processes and IPC; a user namespace is made where this needs one."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(APART) == 0:
        return
    call("unshare", APART | NEW_USER)
    for name, words in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(words)


def show(path: str) -> None:
    """Make a path of the old root visible: read-only, no set-user-id programs, no devices but the few known."""
    old = "/old" + path
    if os.path.islink(old):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.symlink(os.readlink(old), path)
    if not os.path.exists(old):
        return None
    os.makedirs(path if os.path.isdir(old) else os.path.dirname(path), exist_ok=True)
    if not os.path.isdir(old):
        open(path, "w").close()
    mount(old, path, None, MS_BIND | MS_REC)
    nodev = 0 if path.startswith("/dev/") else MS_NODEV
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | nodev, 0, 0, 0)  # struct mount_attr
    number, anywhere, recursive, size = map(ctypes.c_long, (MOUNT_SETATTR, -1, AT_RECURSIVE, 32))
    call("syscall", number, anywhere, path.encode(), recursive, attributes, size)


def new_root(order: Order, uid: int, gid: int) -> None:
    """A root of its own: what is visible read-only, and one small folder in memory to write to. No /proc."""
    call("unshare", NEW_NS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.chdir("/tmp")
    os.mkdir("old")
    call("pivot_root", b".", b"old")
    os.chdir("/")
    devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    seen: list[str] = []
    for path in sorted({*order.visible, *devices}):
        if not any(path.startswith(parent + "/") for parent in seen):
            show(path)
            seen += [] if os.path.islink(path) else [path]
    os.mkdir(HOME)
    options = f"size={order.disk_mb}m,nr_inodes=4096,mode=700,uid={uid},gid={gid}"
    mount("tmpfs", HOME, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for link in ("/tmp", "/dev/shm"):
        if not os.path.lexists(link):  # Python itself may live there
            os.symlink(HOME, link)
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    mount("none", "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, "size=1m")


def unprivileged(order: Order) -> int:
    """Whom the command runs as: nobody where we are root and nobody can run it, else as whom we are."""
    if os.geteuid() != 0 or not LINUX:
        return os.geteuid()
    needed = [path for path in (*order.visible, order.argv[0]) if os.path.exists(path)]
    try:
        os.setresuid(NOBODY, NOBODY, 0)
    except OSError:  # no such user in this user namespace
        return os.geteuid()
    readable = order.namespaces or all(os.access(path, os.R_OK) for path in needed)
    os.setresuid(0, 0, 0)
    return NOBODY if readable else 0


def limit(order: Order) -> None:
    """Limits of every single process; the warden watches over all together."""
    mega = 1 << 20
    wanted = {
        resource.RLIMIT_CPU: order.cpu_seconds,
        resource.RLIMIT_AS: order.memory_mb * mega,
        resource.RLIMIT_FSIZE: order.disk_mb * mega,
        resource.RLIMIT_NPROC: order.processes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        grace = 1 if kind == resource.RLIMIT_CPU and hard in (resource.RLIM_INFINITY, value + 1) else 0
        try:
            resource.setrlimit(kind, (value, value + grace))  # a second between SIGXCPU, which tells, and SIGKILL
        except (OSError, ValueError):
            if LINUX:  # macOS knows no limit of address space
                raise


def drop_powers(uid: int) -> None:
    """Become ``uid``, lose every capability for ever, never gain one by running a program."""
    if uid != os.geteuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        libc.unshare(NEW_USER)  # if it may: processes are counted per user and user namespace
    if not LINUX:
        return
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", header, (ctypes.c_uint32 * 6)())


def run(order: Order, uid: int, ready: int) -> None:
    """Become the command; never returns."""
    os.setsid()
    os.chdir(HOME if order.namespaces else order.folder or "/")
    null = os.open("/dev/null", os.O_RDWR)
    drop_powers(uid)
    limit(order)
    os.nice(10)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which forgets it
    copies = [os.dup(number) for number in (*order.fds, ready)]  # each at or above its target: none closes another
    for target, source in enumerate([null, null, null, *copies]):
        os.dup2(source, target, inheritable=target < 3 + len(order.fds))
    os.closerange(4 + len(order.fds), 1 << 12)
    try:
        os.execve(order.argv[0], order.argv, order.env)
    except OSError as error:
        os.write(3 + len(order.fds), str(error).encode())
        os._exit(126)


def init(order: Order, ready: int) -> None:
    """Process 1 of the namespace: when it ends, the kernel kills whatever is left there. Never returns."""
    uid = unprivileged(order)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)
    new_root(order, uid, uid if uid == NOBODY else os.getegid())
    command = os.fork()
    if command == 0:
        guarded(ready, run, order, uid, ready)
    os.closerange(0, 1 << 12)
    while True:
        pid, status = os.wait()
        if pid == command:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def guarded(ready: int, work: Any, *args: Any) -> None:
    """Work that never returns; what goes wrong is told to the warden."""
    try:
        work(*args)
    except BaseException as error:
        os.write(ready, f"{type(error).__name__}: {error}".encode()[:500])
    os._exit(126)


class Process(NamedTuple):
    """A line of the process table."""

    pid: int
    parent: int
    resident: int  # bytes


def process_table() -> Iterator[Process]:
    """All processes of this host; nothing where there is no /proc."""
    page = os.sysconf("SC_PAGE_SIZE")
    for name in os.listdir("/proc") if LINUX else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    words = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            yield Process(int(name), int(words[1]), int(words[21]) * page)


def descendants() -> list[Process]:
    """Children of this process, their children, and so on."""
    children: dict[int, list[Process]] = {}
    for process in process_table():
        children.setdefault(process.parent, []).append(process)
    found, left = [], [os.getpid()]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += [process.pid for process in below]
    return found


def used_disk(folder: str | None) -> int:
    """Bytes of the files in a folder."""
    total = 0
    for place, _, names in os.walk(folder) if folder else ():
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                continue
    return total


def exit_of(child: int, patience: float = 0.0) -> str:
    """How the command ended by itself, "" where it still runs; without an asker it ends soon."""
    until = time.monotonic() + patience
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status) & 0xFF  # as `init` hands it on: 256 − signal
            return {0: "exit", 256 - signal.SIGXCPU: "cpu time"}.get(
                code, f"exit code {code}" if code < 192 else f"signal {256 - code}"
            )
        if time.monotonic() >= until:
            return ""
        time.sleep(0.005)


def watch(order: Order, child: int) -> str:
    """Wait for the end of the command; says why it ended: see `exit_of`, "released" (it still ran), or a limit."""
    deadline, pause = time.monotonic() + order.wall_seconds, 0.02
    while True:
        if select.select([0], [], [], pause)[0]:
            return exit_of(child, patience=0.05) or "released"
        if end := exit_of(child):
            return end
        if time.monotonic() > deadline:
            return "wall time"
        if pause == 0.25:  # looking at all processes has its price; short programs are not looked at
            processes = descendants()
            if sum(process.resident for process in processes) > order.memory_mb << 20:
                return "memory"
            if len(processes) > order.processes + 2:
                return "processes"
            if used_disk(order.folder) > order.disk_mb << 20:
                return "disk"
        pause = min(2 * pause, 0.25)


def sweep(child: int) -> None:
    """Kill whatever is left, orphans and daemons too."""
    for _ in range(1000):
        left = [process.pid for process in descendants()]
        for pid in left or [child]:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        try:
            os.killpg(child, signal.SIGKILL)  # where there is no process table, the group is all there is
        except OSError:
            pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def main() -> None:
    """The warden."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return
        line += piece
    order = Order(**json.loads(line))
    if LINUX:
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # if memory runs out after all, this goes first
        except OSError:
            pass
    ready, tell = os.pipe()
    try:
        if order.namespaces:
            leave_namespaces()
        else:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            prctl(PR_SET_DUMPABLE, 0)  # no debugger may attach
    except OSError as error:
        return say({"error": str(error)})
    child = os.fork()
    if child == 0:
        os.close(ready)
        if order.namespaces:
            guarded(tell, init, order, tell)
        guarded(tell, run, order, unprivileged(order), tell)
    for number in (*order.fds, tell):
        os.close(number)
    error = os.read(ready, 1000).decode()
    say({"error": error} if error else {"started": True})
    end = watch(order, child) if not error else "error"
    sweep(child)
    say({"end": end})


def say(words: dict[str, Any]) -> None:
    """A line for whoever started the warden."""
    os.write(1, json.dumps(words).encode() + b"\n")


if __name__ == "__main__":
    main()
