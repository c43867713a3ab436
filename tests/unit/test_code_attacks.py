"""Programs that try to pass without being right, or to do harm: all score 0, and nothing of them is left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dgd_lightning.scoring.code import CodeGrader
from dgd_lightning.scoring.sandbox import JAIL, Limits
from dgd_lightning.types import Score

# Small enough that no attack can endanger the machine; every bomb below is bounded as well.
SMALL = Limits(cpu_seconds=1, wall_seconds=6.0, memory_mb=200, processes=8, disk_mb=8)
ROW = {
    "task_id": "add",
    "prompt": 'def add(a: int, b: int) -> int:\n    """The sum of two numbers."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    for a, b in [(1, 2), (5, 7), (-3, 3), (10**20, 1)]:\n"
    "        assert candidate(a, b) == a + b, 'no sum'\n    assert not candidate(1, -1)\n",
}
WRONG = "def add(a, b): return 0\n"

FORGERS = {
    "exit at once": "import sys\nsys.exit(0)\n" + WRONG,
    "exit in the call": "import sys\ndef add(a, b): sys.exit(0)",
    "os._exit at once": "import os\nos._exit(0)\n" + WRONG,
    "os._exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "raise SystemExit": "def add(a, b): raise SystemExit(0)",
    "raise StopIteration": "def add(a, b): raise StopIteration",
    "raise AssertionError": "def add(a, b): raise AssertionError",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\n" + WRONG,
    "patched builtins": "import builtins\nfor name in ('all', 'any', 'abs', 'len', 'isinstance', 'exec', 'compile'):\n"
    "    setattr(builtins, name, lambda *a, **k: True)\nbuiltins.AssertionError = ZeroDivisionError\n" + WRONG,
    "patched exit and hooks": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\n"
    "sys.exit = os.abort = lambda *a: os._exit(0)\nsys.unraisablehook = sys.excepthook\n" + WRONG,
    "settrace": "import sys\ndef trace(frame, event, arg):\n    frame.f_globals['passed'] = True\n    return trace\n"
    "sys.settrace(trace)\nsys.setprofile(trace)\n" + WRONG,
    "equality liar": "class Yes(int):\n    __eq__ = __ne__ = __lt__ = __gt__ = lambda self, other: True\n"
    "    __hash__ = int.__hash__\n    __bool__ = lambda self: False\ndef add(a, b): return Yes(3)",
    "equality liar, no number": "class Yes:\n    __eq__ = lambda self, other: True\n    __bool__ = lambda self: False\n"
    "def add(a, b): return Yes()",
    "lying repr": "class Yes(str):\n    __repr__ = __str__ = lambda self: '3'\ndef add(a, b): return Yes('4')",
    "not a number": "def add(a, b): return float('nan')",
    "walk the frames": "import sys\nfound = []\nframe = sys._getframe()\nwhile frame:\n"
    "    for space in (frame.f_locals, frame.f_globals):\n"
    "        for key in list(space):\n            if key in ('verdict', 'task', 'tests', 'check', 'passed'):\n"
    "                found.append(space[key])\n    frame = frame.f_back\n"
    "def add(a, b): return a + b if found else 0",
    "walk the garbage collector": "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and "
    "any(isinstance(v, str) and 'no ' + 'sum' in v for v in list(o.values()))]\n"
    "found = [o for o in found if '__name__' not in o and 'answer' not in o]\ndef add(a, b): return a + b if found else 0",
    "read argv, environment, stdin": "import sys, os\ntext = repr(sys.argv) + repr(dict(os.environ)) + sys.stdin.read()\n"
    "def add(a, b): return a + b if 'no ' + 'sum' in text or 'a + ' + 'b' in text else 0",
    "read own memory": "import re\ntext = open('/proc/self/mem', 'rb')\n" + WRONG,
    "write others' memory": "import os\nfor pid in range(1, 400):\n    if pid == os.getpid():\n        continue\n    try:\n"
    "        open(f'/proc/{pid}/mem', 'r+b').write(b'0')\n        found = True\n    except OSError:\n        pass\n" + WRONG,
    "ptrace": "import ctypes, os\nlibc = ctypes.CDLL(None)\nhit = [p for p in range(1, 64) if p != os.getpid() and "
    "libc.ptrace(16, p, 0, 0) == 0]\ndef add(a, b): return a + b if hit else 0",
    "forge verdicts on every descriptor": "import os, json\nfor fd in range(3, 64):\n    for line in ({'started': True}, "
    "{'passed': 1, 'failure': None, 'fault': 'program', 'found': 'x'}):\n        try:\n"
    "            os.write(fd, json.dumps(line).encode() + b'\\n')\n        except OSError:\n            pass\n" + WRONG,
    "answer before being asked": "import os, json\nfor n in range(1, 50):\n"
    "    os.write(3, json.dumps({'id': n, 'value': 3}).encode() + b'\\n')\n" + WRONG,
    "answer what is no value": "import os, json\ndef add(a, b):\n    import sys\n"
    "    os.write(3, b'{\"id\": 2, \"value\": {\"set\": [[1]], \"x\": 0}}\\n')\n    return 0",
    "answer deeply nested": "import os\ndef add(a, b):\n    os.write(3, b'{\"id\": 2, \"value\": ' + b'[' * 60000)\n"
    "    os.write(3, b']' * 60000 + b'}\\n')\n    return 0",
    "answer too much": "def add(a, b): return 'x' * (20 << 20)",
    "answer without an end": "import itertools\ndef add(a, b): return itertools.count()",
    "import hijack": "for name in ('wire', 'json', 'ast', 'reprlib', 'traceback'):\n"
    "    open(name + '.py', 'w').write('import os; os._exit(0)')\n" + WRONG,
    "pass a helper of the tests' own": "def check(candidate): pass\n" + WRONG,
    "signals to parents": "import os, signal\nfor pid in (os.getppid(), 1):\n    for sig in (signal.SIGKILL, "
    "signal.SIGTERM, signal.SIGSTOP):\n        try:\n            os.kill(pid, sig)\n        except OSError:\n"
    "            pass\n" + WRONG,
}  # fmt: skip

HARMFUL = {
    "signals to all": "import os, signal\ntry:\n    os.kill(-1, signal.SIGKILL)\nexcept OSError:\n    pass\n" + WRONG,
    "fork bomb": "import os, time\nfor _ in range(200):\n    try:\n        os.fork()\n    except OSError:\n"
    "        break\ndef add(a, b): time.sleep(60)",
    "thread bomb": "import threading, time\nfor _ in range(200):\n"
    "    threading.Thread(target=time.sleep, args=(60,)).start()\n" + WRONG,
    "lingering threads": "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n" + WRONG,
    "memory bomb": "data = []\nfor _ in range(600):\n    data.append(bytearray(b'x') * (1 << 20))\n" + WRONG,
    "memory of many processes": "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n"
    "        data = b'x' * (100 << 20)\n        time.sleep(60)\ndef add(a, b): time.sleep(60)",
    "one huge file": "with open('big', 'wb') as file:\n    for _ in range(100):\n        file.write(bytes(1 << 20))\n" + WRONG,
    "many files": "for n in range(100):\n    with open(f'{n}', 'wb') as file:\n        file.write(bytes(1 << 20))\n" + WRONG,
    "many descriptors": "files = [open('/dev/null') for _ in range(5000)]\n" + WRONG,
    "loop at once": "while True: pass\n" + WRONG,
    "loop in the call": "def add(a, b):\n    while True: pass",
    "loop that catches all": "def add(a, b):\n    while True:\n        try:\n            while True: pass\n"
    "        except BaseException: pass",
    "ignored signals": "import signal\nfor n in range(1, 32):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
    "    except OSError:\n        pass\ndef add(a, b):\n    while True: pass",
    "output flood": "import sys\nfor _ in range(2000):\n    print('x' * 100000)\n    print('x' * 100000, file=sys.stderr)\n"
    + WRONG,
    "recursion": "def add(a, b): return add(a, b)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return [f(n + 1)]\ndef add(a, b): return f(0)",
    "nested code": "(" * 5000 + ")" * 5000 + "\n" + WRONG,
    "crash": "import ctypes\nctypes.string_at(0)\n" + WRONG,
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        os.execv('/bin/sleep', ['sleep', '86399'])\n    os._exit(0)\n" + WRONG,
    "subprocess": "import subprocess\nsubprocess.Popen(['sleep', '86399'], start_new_session=True)\n" + WRONG,
    "more limits": "import resource\nfor kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC):\n"
    "    try:\n        resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)\n        lifted = True\n"
    "    except (ValueError, OSError): pass\ndef add(a, b): return a + b if 'lifted' in globals() else 0",
    "delete files": "import shutil, os\nfor place in ({witness!r}, os.getcwd(), '/etc', '/bin', '/dev'):\n"
    "    shutil.rmtree(place, ignore_errors=True)\n" + WRONG,
    "write files": "import os\nfor place in ({witness!r}, '/usr', '/etc', '/lib'):\n    try:\n"
    "        open(os.path.join(place, 'dgd-was-here'), 'w').close()\n        done = True\n    except OSError:\n        pass\n"
    "def add(a, b): return a + b if 'done' in globals() else 0",
    "become root": "import os\ntry:\n    os.setuid(0)\n    gained = os.getuid() == 0\nexcept OSError: gained = False\n"
    "import ctypes\nlibc = ctypes.CDLL(None)\ngained = gained or libc.mount(b'none', b'/', b'tmpfs', 0, None) == 0\n"
    "def add(a, b): return a + b if gained else 0",
}  # fmt: skip


def survivors() -> list[str]:
    """Processes of the sandbox, or of a program that it ran."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(str(JAIL)) for word in words) or words == ["sleep", "86399"]:
            found.append(" ".join(words))
    return found


@pytest.fixture(scope="module")
def grader() -> CodeGrader:
    return CodeGrader(allow_code_execution=True, limits=SMALL)


@pytest.fixture
def isolated(grader: CodeGrader) -> CodeGrader:
    """The grader, where namespaces hold; attacks on files, network and other processes are not tried without."""
    if not grader.sandbox.isolation["files"]:
        pytest.skip(f"no namespaces here: {grader.sandbox.isolation['reason']}")
    return grader


def graded(grader: CodeGrader, program: str, row: dict[str, Any] = ROW) -> Score:
    return grader.grade(row, f"```python\n{program}\n```")


def test_the_problem_can_be_solved(grader: CodeGrader) -> None:
    """Or else no attack could succeed."""
    assert graded(grader, "def add(a, b): return a + b").value == 1.0
    assert graded(grader, WRONG).value == 0.0
    assert not survivors()


@pytest.mark.parametrize("attack", FORGERS)
def test_forging(grader: CodeGrader, attack: str) -> None:
    score = graded(grader, FORGERS[attack])
    assert score.value == 0.0, score
    assert not survivors()


@pytest.mark.parametrize("attack", HARMFUL)
def test_harm(isolated: CodeGrader, attack: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    witness.mkdir(mode=0o777)
    witness.chmod(0o777)
    (witness / "file").write_text("here")
    score = graded(isolated, HARMFUL[attack].replace("{witness!r}", repr(str(witness))))
    assert score.value == 0.0, score
    assert not survivors()
    assert [path.name for path in witness.iterdir()] == ["file"]
    assert (witness / "file").read_text() == "here"


FORGERS_WITHOUT = sorted(FORGERS.keys() - {"signals to parents", "write others' memory", "ptrace"})


@pytest.mark.parametrize("attack", FORGERS_WITHOUT[::4])
def test_forging_without_namespaces(attack: str) -> None:
    score = graded(CodeGrader(allow_code_execution=True, limits=SMALL, namespaces=False), FORGERS[attack])
    assert score.value == 0.0, score
    assert not survivors()


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in /proc")
@pytest.mark.parametrize("attack", ["daemon", "subprocess", "fork bomb", "memory of many processes", "many files"])
def test_harm_without_namespaces(attack: str) -> None:
    grader = CodeGrader(allow_code_execution=True, limits=SMALL, namespaces=False)
    assert grader.sandbox.isolation == {"network": False, "processes": False, "files": False, "reason": "switched off"}
    score = graded(grader, HARMFUL[attack])
    assert score.value == 0.0, score
    assert not survivors()


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in /proc")
@pytest.mark.parametrize("namespaces", ["None", "False"])
def test_nothing_outlives_a_killed_grader(namespaces: str) -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(50)\ndef add(a, b): time.sleep(50)"
    script = (
        "import json, sys\nfrom dgd_lightning.scoring.code import CodeGrader\n"
        f"grader = CodeGrader(allow_code_execution=True, namespaces={namespaces})\n"
        "grader.grade(*json.loads(sys.argv[1]))"
    )
    argv = [sys.executable, "-c", script, json.dumps([ROW, f"```\n{program}\n```"])]
    grading = subprocess.Popen(argv)
    wait_until(lambda: len(survivors()) >= 5)  # two wardens, the tests, the program and its child
    grading.kill()
    grading.wait()
    wait_until(lambda: not survivors())


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# What a program can reach, told by problems whose answer lies outside.

SECRET = "7d1f0c"
FINDERS = {
    "file": "def find(): return open({path!r}).read()",
    "home": "import glob, os\ndef find():\n    for path in glob.glob(os.path.expanduser('~/*')) + "
    "glob.glob({home!r} + '/*'):\n        return open(path).read()",
    "environment": "import os\ndef find(): return os.environ['DGD_TEST_KEY']",
    "parent's environment": "import re\ndef find():\n    for pid in range(1, 100000):\n        try:\n"
    "            text = open(f'/proc/{pid}/environ').read()\n        except OSError:\n            continue\n"
    "        if 'DGD_TEST_KEY' in text:\n            return text.split('DGD_TEST_KEY=')[1][:6]",
    "network": "import socket\ndef find():\n    return socket.create_connection(('127.0.0.1', {port}), 2).recv(6).decode()",
}


@pytest.fixture
def port() -> Iterator[int]:
    """A server that tells the secret to everybody."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(SECRET.encode())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


@pytest.mark.parametrize("namespaces", [None, False])
@pytest.mark.parametrize("finder", FINDERS)
def test_reach(
    finder: str, namespaces: bool | None, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grader = CodeGrader(allow_code_execution=True, limits=SMALL, namespaces=namespaces)
    on = grader.sandbox.isolation["files"]
    if on == (namespaces is False):
        pytest.skip("no namespaces here")
    (tmp_path / "key").write_text(SECRET)
    monkeypatch.setenv("DGD_TEST_KEY", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path))
    program = FINDERS[finder].replace("{path!r}", repr(str(tmp_path / "key")))
    program = program.replace("{home!r}", repr(str(tmp_path))).replace("{port}", str(port))
    row = {
        "prompt": 'def find() -> str:\n    """The secret."""\n',
        "entry_point": "find",
        "test": f"def check(candidate):\n    assert candidate() == {SECRET!r}\n",
    }
    score = graded(grader, program, row)
    if on or finder == "environment":
        assert score.value == 0.0, score
    elif finder == "network":  # the same program does succeed where nothing stops it, so the check above can fail
        assert score.value == 1.0, score


def test_the_graders_own_environment_stays(grader: CodeGrader) -> None:
    before = dict(os.environ)
    graded(grader, "import os\nos.environ.clear()\n" + textwrap.dedent(WRONG))
    assert dict(os.environ) == before
