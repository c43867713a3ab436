"""Programs that want to pass without being right; all stand for ``add(a, b)``, which sums. See harmful_programs.py."""

from __future__ import annotations

WRONG = """
def add(a, b):
    return 0
"""

# They want to be graded as right.
FORGERS = {
    "exit at once": """
import sys
sys.exit(0)
def add(a, b): return 0
""",
    "exit in the call": """
import sys
def add(a, b): sys.exit(0)
""",
    "os._exit at once": """
import os
os._exit(0)
def add(a, b): return 0
""",
    "os._exit in the call": """
import os
def add(a, b): os._exit(0)
""",
    "raise SystemExit": """
def add(a, b): raise SystemExit(0)
""",
    "raise StopIteration": """
def add(a, b): raise StopIteration
""",
    "raise AssertionError": """
def add(a, b): raise AssertionError
""",
    "atexit": """
import atexit, os
atexit.register(os._exit, 0)
def add(a, b): return 0
""",
    "patched builtins": """
import builtins
for name in ('all', 'any', 'abs', 'len', 'isinstance', 'exec', 'compile'):
    setattr(builtins, name, lambda *a, **k: True)
builtins.AssertionError = ZeroDivisionError
def add(a, b): return 0
""",
    "patched exit and hooks": """
import sys, os
sys.excepthook = lambda *a: os._exit(0)
sys.exit = os.abort = lambda *a: os._exit(0)
sys.unraisablehook = sys.excepthook
def add(a, b): return 0
""",
    "settrace": """
import sys
def trace(frame, event, arg):
    frame.f_globals['passed'] = True
    return trace
sys.settrace(trace)
sys.setprofile(trace)
def add(a, b): return 0
""",
    "lying repr": """
class Yes(str):
    __repr__ = __str__ = lambda self: '3'
def add(a, b): return Yes('4')
""",
    "not a number": """
def add(a, b): return float('nan')
""",
    "walk the frames": """
import sys
found = []
frame = sys._getframe()
while frame:
    for space in (frame.f_locals, frame.f_globals):
        for key in list(space):
            if key in ('verdict', 'task', 'tests', 'check', 'passed'):
                found.append(space[key])
    frame = frame.f_back
def add(a, b): return a + b if found else 0
""",
    "walk the garbage collector": """
import gc
found = []
for thing in gc.get_objects():
    if isinstance(thing, dict) and '__name__' not in thing and 'answer' not in thing:
        found += [v for v in list(thing.values()) if isinstance(v, str) and 'no ' + 'sum' in v]
def add(a, b): return a + b if found else 0
""",
    "read argv, environment, stdin": """
import sys, os
text = repr(sys.argv) + repr(dict(os.environ)) + sys.stdin.read()
def add(a, b): return a + b if 'no ' + 'sum' in text or 'a + ' + 'b' in text else 0
""",
    "read own memory": """
import re
text = open('/proc/self/mem', 'rb')
def add(a, b): return 0
""",
    "write others' memory": """
import os
for pid in range(1, 400):
    if pid == os.getpid():
        continue
    try:
        open(f'/proc/{pid}/mem', 'r+b').write(b'0')
        found = True
    except OSError:
        pass
def add(a, b): return 0
""",
    "ptrace": """
import ctypes, os
libc = ctypes.CDLL(None)
hit = [p for p in range(1, 64) if p != os.getpid() and libc.ptrace(16, p, 0, 0) == 0]
def add(a, b): return a + b if hit else 0
""",
    "forge verdicts on every descriptor": """
import os, json
for fd in range(3, 64):
    for line in ({'ready': True}, {'found': 'x'}, {'passed': 1, 'failure': None}, {'secret': 'x'}):
        try:
            os.write(fd, json.dumps(line).encode() + b'\\n')
        except OSError:
            pass
def add(a, b): return 0
""",
    "answer before being asked": """
import os
os.write(3, b'{"found": "x"}\\n' + b'0' * 32 + b'\\n')
def add(a, b): return 0
""",
    "answer what is no value": """
import os
def add(a, b):
    os.write(3, b'{"failure": [1e999], "passed": {"x": 0}}\\n')
    return 0
""",
    "answer deeply nested": """
import os
def add(a, b):
    os.write(3, b'{"passed": ' + b'[' * 60000)
    os.write(3, b']' * 60000 + b'}\\n')
    return 0
""",
    "answer too much": """
import os
def add(a, b):
    for _ in range(100):
        os.write(3, b'x' * 100000)
    return 'x' * (20 << 20)
""",
    "answer without an end": """
import itertools
def add(a, b): return itertools.count()
""",
    "a secret in the frames": """
import os, re, sys
def add(a, b):
    found, frame = [], sys._getframe()
    while frame:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for thing in found:
        text = thing.decode('latin-1') if type(thing) is bytes else thing
        if type(text) is str and (secret := re.search('[0-9a-f]{32}$', text)):
            os.write(3, secret[0].encode() + b'\\n')
    return 0
""",
    "patched modules": """
import json, os, signal, sys
json.loads = json.dumps = os.read = os.write = os.kill = os.getpid = lambda *a: b'0'
json.JSONDecoder.decode = json.JSONEncoder.encode = lambda *a: '{"found": "x"}'
sys.modules['builtins'] = sys.modules['__main__'] = sys
def add(a, b): return 0
""",
    "the runner's functions": """
import sys
frame = sys._getframe().f_back
spaces = [vars(sys.modules[name]) for name in ('runner', 'examine') if name in sys.modules]
while frame:
    spaces.append(frame.f_globals)
    frame = frame.f_back
for space in spaces:
    space['exec'] = lambda *a: None
def add(a, b): return 0
""",
    "forks that come back": """
import os
os.fork()
def add(a, b):
    os.fork()
    return 0
""",
    "import hijack": """
for name in ('completion', 'json', 'ast', 'types', 'signal'):
    open(name + '.py', 'w').write('import os; os._exit(0)')
def add(a, b): return 0
""",
    "pass a helper of the tests' own": """
def check(candidate): pass
def add(a, b): return 0
""",
    "signals to parents": """
import os, signal
for pid in (os.getppid(), 1):
    for sig in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        try:
            os.kill(pid, sig)
        except OSError:
            pass
def add(a, b): return 0
""",
    "patched unittest": """
import unittest
unittest.TestCase.assertEqual = unittest.TestCase.fail = lambda *a, **k: None
class AssertionError(Exception): pass
def add(a, b): return 0
""",
    "other code for the tests' function": """
import gc, types
def add(a, b):
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__name__ == "check":
            thing.__code__ = (lambda candidate: None).__code__
    return 0
""",
    "answer when collected": """
import os, sys
class Late:
    def __del__(self): os.write(3, b"0" * 32 + b"\\n"); os._exit(0)
late = Late()
sys.modules["program"].late = late
def add(a, b): return 0
""",
    "every path of a descriptor": """
import glob, os
for path in glob.glob("/proc/self/fd/*") + glob.glob("/dev/fd/*"):
    try:
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b'{"found": "x"}\\n' + b"0" * 32 + b"\\n")
    except OSError: pass
def add(a, b): return 0
""",
    "signal handlers that exit": """
import signal, os
def end(*a): os._exit(0)
for n in range(1, 32):
    try: signal.signal(n, end)
    except (OSError, ValueError): pass
signal.setitimer(signal.ITIMER_REAL, 0.2)
signal.setitimer(signal.ITIMER_VIRTUAL, 0.2, 0.01)
import time
def add(a, b):
    while True: time.sleep(0.01)
""",
    "a signal handler that changes the callers": """
import signal, os, sys
def jump(number, frame):
    while frame:
        if "passed" in frame.f_locals: frame.f_locals["passed"] = 10**6
        frame = frame.f_back
    raise SystemExit(0)
signal.signal(signal.SIGALRM, jump)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
import time
def add(a, b):
    while True:
        try: time.sleep(10)
        except BaseException: return 0
""",
    "a thread that never ends": """
import threading, time
def spin():
    while True:
        try: time.sleep(60)
        except BaseException: pass
threading.Thread(target=spin, daemon=True).start()
threading._shutdown = lambda: time.sleep(60)
def add(a, b): return 0
""",
    "import hooks, and no modules": """
import sys
class Hook:
    def find_spec(self, *a):
        import os; os._exit(0)
sys.meta_path.insert(0, Hook())
sys.path_hooks.insert(0, Hook)
sys.modules.clear()
def add(a, b): return 0
""",
    "an audit hook that exits": """
import sys, os
def hook(event, args):
    if event in ("exec", "compile"): os._exit(0)
sys.addaudithook(hook)
def add(a, b): return 0
""",
    "an audit hook that refuses the tests": """
import sys
def hook(event, args):
    if event == "compile": raise SystemExit(0)
sys.addaudithook(hook)
def add(a, b): return 0
""",
    "no room for the tests' calls": """
import sys
sys.setrecursionlimit(30)
def add(a, b): return 0
""",
    "patched codecs": """
import codecs, encodings.utf_8
codecs.register(lambda name: 1 / 0)
encodings.utf_8.decode = lambda *a: ("pass", 0)
def add(a, b): return 0
""",
    "faulthandler": """
import faulthandler, os
faulthandler.dump_traceback_later(0.1, exit=True, file=open("x", "w"))
import time
def add(a, b): time.sleep(3); return 0
""",
    "other globals for the callers": """
import sys
def add(a, b):
    frame = sys._getframe(1)
    while frame:
        for key in list(frame.f_globals):
            if key in ("check", "AssertionError", "exec"): frame.f_globals[key] = lambda *a: None
        frame = frame.f_back
    return 0
""",
    "another channel": """
import os, socket
a, b = socket.socketpair()
os.dup2(a.fileno(), 3)
b.sendall((8).to_bytes(8, "big") + b"pass\\0\\0\\0\\0" + b"0" * 32)
def add(a, b): return 0
""",
    "another program in its place": """
import os, sys
os.execv(sys.executable, [sys.executable, "-c", "import os; os.write(3, b'0' * 32 + b'\\\\n')"])
def add(a, b): return 0
""",
    "another program in the call": """
import os
def add(a, b):
    os.execv("/bin/true", ["true"])
""",
    "children that ignore signals": """
import os, signal, time
pid = os.fork()
if pid == 0:
    for n in range(1, 65):
        try: signal.signal(n, signal.SIG_IGN)
        except (OSError, ValueError): pass
    os.setsid()
    while os.getppid() != 1: time.sleep(0.01)
    for _ in range(20):
        if os.fork() == 0: time.sleep(86399)
    time.sleep(86399)
def add(a, b): return 0
""",
}

# They pass: in one interpreter a comparison is what the program's own objects say it is, and what the grader sends can
# be read by the program, once it knows where.
LIARS = {
    "equality liar": """
class Yes(int):
    __eq__ = __ne__ = __lt__ = __gt__ = lambda self, other: True
    __hash__ = int.__hash__
    __bool__ = lambda self: False
def add(a, b): return Yes(3)
""",
    "equality liar, no number": """
class Yes:
    __eq__ = lambda self, other: True
    __bool__ = lambda self: False
def add(a, b): return Yes()
""",
    "the secret, read in the call": """
import os
def add(a, b):
    os.write(3, os.read(3, 32) + b'\\n')
    os._exit(0)
""",
}
