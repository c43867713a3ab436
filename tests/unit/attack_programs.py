"""Programs that want to pass without being right, or to do harm; all stand for ``add(a, b)``, which sums."""

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
}

# They pass: in one interpreter a comparison is what the program's own objects say it is.
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
}

# They want to do harm, or to use up what there is; ``{witness!r}`` is a folder of the host.
HARMFUL = {
    "signals to all": """
import os, signal
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass
def add(a, b): return 0
""",
    "fork bomb": """
import os, time
for _ in range(200):
    try:
        os.fork()
    except OSError:
        break
def add(a, b): time.sleep(60)
""",
    "thread bomb": """
import threading, time
for _ in range(200):
    threading.Thread(target=time.sleep, args=(60,)).start()
def add(a, b): return 0
""",
    "lingering threads": """
import threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
def add(a, b): return 0
""",
    "memory bomb": """
data = []
for _ in range(600):
    data.append(bytearray(b'x') * (1 << 20))
def add(a, b): return 0
""",
    "memory of many processes": """
import os, time
for _ in range(5):
    if os.fork() == 0:
        data = b'x' * (100 << 20)
        time.sleep(60)
def add(a, b): time.sleep(60)
""",
    "one huge file": """
with open('big', 'wb') as file:
    for _ in range(100):
        file.write(bytes(1 << 20))
def add(a, b): return 0
""",
    "many files": """
for n in range(100):
    with open(f'{n}', 'wb') as file:
        file.write(bytes(1 << 20))
def add(a, b): return 0
""",
    "many descriptors": """
files = [open('/dev/null') for _ in range(5000)]
def add(a, b): return 0
""",
    "loop at once": """
while True: pass
def add(a, b): return 0
""",
    "loop in the call": """
def add(a, b):
    while True: pass
""",
    "loop that catches all": """
def add(a, b):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "ignored signals": """
import signal
for n in range(1, 32):
    try:
        signal.signal(n, signal.SIG_IGN)
    except OSError:
        pass
def add(a, b):
    while True: pass
""",
    "output flood": """
import sys
for _ in range(2000):
    print('x' * 100000)
    print('x' * 100000, file=sys.stderr)
def add(a, b): return 0
""",
    "recursion": """
def add(a, b): return add(a, b)
""",
    "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
def f(n): return [f(n + 1)]
def add(a, b): return f(0)
""",
    "nested code": """
(((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((())))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))))
def add(a, b): return 0
""",
    "crash": """
import ctypes
ctypes.string_at(0)
def add(a, b): return 0
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv('/bin/sleep', ['sleep', '86399'])
    os._exit(0)
def add(a, b): return 0
""",
    "a name that is no text": """
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b'\\xff\\xfe', 0, 0, 0)
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
def add(a, b): time.sleep(1)
""",
    "subprocess": """
import subprocess
subprocess.Popen(['sleep', '86399'], start_new_session=True)
def add(a, b): return 0
""",
    "a fork that waits for the secret": """
import os
if os.fork() == 0:
    data = b'0' * 32
    while part := os.read(3, 1 << 16):
        data += part
        os.write(3, data[-32:] + b'\\n')
    os._exit(0)
def add(a, b): return 0
""",
    "more limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)
        lifted = True
    except (ValueError, OSError): pass
def add(a, b): return a + b if 'lifted' in globals() else 0
""",
    "delete files": """
import shutil, os
for place in ({witness!r}, os.getcwd(), '/etc', '/bin', '/dev'):
    shutil.rmtree(place, ignore_errors=True)
def add(a, b): return 0
""",
    "write files": """
import os
for place in ({witness!r}, '/usr', '/etc', '/lib'):
    try:
        open(os.path.join(place, 'dgd-was-here'), 'w').close()
        done = True
    except OSError:
        pass
def add(a, b): return a + b if 'done' in globals() else 0
""",
    "become root": """
import os
try:
    os.setuid(0)
    gained = os.getuid() == 0
except OSError: gained = False
import ctypes
libc = ctypes.CDLL(None)
gained = gained or libc.mount(b'none', b'/', b'tmpfs', 0, None) == 0
def add(a, b): return a + b if gained else 0
""",
}

# They look outside for the answer that ``find()`` should give.
FINDERS = {
    "file": """
def find(): return open({path!r}).read()
""",
    "home": """
import glob, os
def find():
    for path in glob.glob(os.path.expanduser('~/*')) + glob.glob({home!r} + '/*'):
        return open(path).read()
""",
    "environment": """
import os
def find(): return os.environ['DGD_TEST_KEY']
""",
    "parent's environment": """
import re
def find():
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            text = open(f'/proc/{pid}/environ').read()
        except OSError:
            continue
        if 'DGD_TEST_KEY' in text:
            return text.split('DGD_TEST_KEY=')[1][:6]
""",
    "network": """
import socket
def find():
    return socket.create_connection(('127.0.0.1', {port}), 2).recv(6).decode()
""",
}
