"""What confines a program: namespaces, a root of its own, limits, no powers; Linux's calls through libc."""

import ctypes
import os
import resource
import sys
from typing import Any, NamedTuple

libc = ctypes.CDLL(None, use_errno=True)
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
APART = NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_RECURSIVE, DETACH = 442, 0x8000, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
NOBODY = 65534
HOME = "/sandbox"  # inside a root of its own
LINUX = sys.platform == "linux"


class Order(NamedTuple):
    """How to run a program."""

    channel: int  # file descriptor
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
    """Whom the program runs as: nobody where we are root and nobody can read Python, else as whom we are."""
    if os.geteuid() != 0 or not LINUX:
        return os.geteuid()
    needed = [path for path in order.visible if os.path.exists(path)]
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
            resource.setrlimit(kind, (value, value + grace))  # a second between SIGXCPU, a reason, and SIGKILL
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
