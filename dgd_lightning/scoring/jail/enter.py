"""Stand-alone program: runs one program in namespaces and limits of its own, and sees that nothing of it outlives it.

    warden (this process, outside) ─► init (process 1 of a process namespace of its own) ─► runner, without powers

It reads one line of JSON from stdin (`Order`), writes one line when the runner has started, one when all is over.
The runner ends when stdin is closed (so also when whoever started the warden dies), when it exits, or at a limit.
Where the kernel allows no namespaces, the warden itself is the parent, adopts orphans, and kills all descendants at
the end.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine
import runner
from confine import Order
from examine import CHANNEL

sys.path[:] = map(os.path.realpath, [*sys.path[1:], *sys.argv[1:]])  # of programs: installed packages come last
sys.argv[:] = [""]
sys.dont_write_bytecode = True  # from here on


def run(order: Order, uid: int) -> None:
    """Become the runner; never returns. That it has started is told by the closing of all other descriptors."""
    os.setsid()
    os.chdir(confine.HOME if order.namespaces else order.folder or "/")
    null = os.open("/dev/null", os.O_RDWR)
    confine.drop_powers(uid)
    confine.limit(order)
    os.nice(5)
    confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which forgets it
    for target in range(3):
        os.dup2(null, target)
    os.dup2(order.channel, CHANNEL, inheritable=False)
    os.closerange(CHANNEL + 1, 1 << 12)
    runner.main()


def init(order: Order, ready: int) -> None:
    """Process 1 of the namespace: when it ends, the kernel kills whatever is left there. Never returns."""
    uid = confine.unprivileged(order)
    confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)
    confine.new_root(order, uid, uid if uid == confine.NOBODY else os.getegid())
    command = os.fork()
    if command == 0:
        guarded(ready, run, order, uid)
    os.closerange(0, 1 << 12)
    while True:
        pid, status = os.wait()
        if pid == command:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def guarded(ready: int, work: Any, *args: Any) -> None:
    """Work that never returns; what goes wrong is reported to the warden."""
    try:
        work(*args)
    except BaseException as error:
        os.write(ready, f"{type(error).__name__}: {error}".encode()[:500])
    os._exit(126)


def descendants() -> dict[int, int]:
    """Children of this process, their children, and so on, with their resident bytes; none where there is no /proc."""
    page = os.sysconf("SC_PAGE_SIZE")
    children: dict[int, dict[int, int]] = {}
    for name in os.listdir("/proc") if confine.LINUX else ():
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                words = file.read().rpartition(b")")[2].split()  # a name may be no text
                children.setdefault(int(words[1]), {})[int(name)] = int(words[21]) * page
    found: dict[int, int] = {}
    left = [os.getpid()]
    while left:
        below = children.get(left.pop(), {})
        found |= below
        left += below
    return found


def used_disk(folder: str | None) -> int:
    """Bytes of the files in a folder."""
    total = 0
    for place, _, names in os.walk(folder) if folder else ():
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def exit_of(child: int, patience: float = 0.0) -> str:
    """How the runner ended by itself, "" where it still runs."""
    until = time.monotonic() + patience
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status) & 0xFF
            if code <= 256 - signal.NSIG:
                return f"exit code {code}" if code else "exit"
            number = 256 - code  # as `init` hands a signal on
            return "cpu time" if number == signal.SIGXCPU else f"signal {number}"
        if time.monotonic() >= until:
            return ""
        time.sleep(0.005)


def watch(order: Order, child: int) -> str:
    """Wait for the end of the runner; says why it ended: see `exit_of`, "released" (it still ran), or a limit."""
    deadline, pause = time.monotonic() + order.wall_seconds, 0.02
    while True:
        if select.select([0], [], [], pause)[0]:
            return exit_of(child, patience=0.05) or "released"  # with nobody to ask it, the runner soon ends itself
        if end := exit_of(child):
            return end
        if time.monotonic() > deadline:
            return "wall time"
        if pause == 0.25:  # looking at all processes has its price; short programs are not looked at
            processes = descendants()
            if sum(processes.values()) > order.memory_mb << 20:
                return "memory"
            if len(processes) > order.processes + 2:
                return "processes"
            if used_disk(order.folder) > order.disk_mb << 20:
                return "disk"
        pause = min(2 * pause, 0.25)


def sweep(child: int) -> None:
    """Kill whatever is left, orphans and daemons too."""
    for _ in range(1000):
        for pid in descendants() or [child]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)  # where there is no process table, the group is all there is
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def main() -> None:
    """The warden."""
    line = sys.stdin.buffer.readline()  # the only one
    if not line.endswith(b"\n"):
        return
    order = Order(**json.loads(line))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out after all, this goes first
    ready, tell = os.pipe()
    try:
        if order.namespaces:
            confine.leave_namespaces()
        else:
            confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
            confine.prctl(confine.PR_SET_DUMPABLE, 0)  # no debugger may attach
    except OSError as error:
        return say({"error": str(error)})
    child = os.fork()
    if child == 0:
        os.close(ready)
        if order.namespaces:
            guarded(tell, init, order, tell)
        guarded(tell, run, order, confine.unprivileged(order))
    for number in (order.channel, tell):
        os.close(number)
    wrong = os.read(ready, 1000).decode()  # nothing comes where the runner has started
    say({"error": wrong} if wrong else {"started": True})
    end = "error" if wrong else watch(order, child)
    sweep(child)
    if order.folder:
        import shutil  # seldom needed, and slow to import

        shutil.rmtree(order.folder, ignore_errors=True)  # whoever made it may be dead
    say({"end": end})


def say(words: dict[str, Any]) -> None:
    """A line for whoever started the warden."""
    os.write(1, json.dumps(words).encode() + b"\n")


if __name__ == "__main__":
    main()
