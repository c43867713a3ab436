"""Runs an answer's program, then, in the same interpreter, its tests, which are sent only when the program has run.

    → the program's order (JSON), and what the tests need      ← {"ready": true}, before any code of the answer runs
    (the program runs)                                         ← {"found": …}: how it was found
    → the tests, and behind them a secret                      ← the secret: every test has passed
                                                               ← {"failure": …, "passed": …} instead, at any time

The secret stays in the kernel until the tests are through, and nothing but the secret counts as success. The program
shares this interpreter and can reach everything in it: docs/scoring.md says which attacks are held off.
"""

import builtins
import sys
from json import dumps, loads
from os import _exit, getpid
from types import ModuleType

from completion import find_program


def main() -> None:
    """Run one program and its tests, and end, whatever threads and handlers the program has left."""
    try:
        work()
    finally:
        _exit(0)


def work() -> None:
    """Run one program and its tests. What is used after the program has run is local: its globals can be changed."""
    from examine import BUILT_IN, examine, receive, say, told

    own, order = getpid(), loads(receive())
    names, space = order["names"], {"__name__": "tests", "__builtins__": dict(BUILT_IN)}  # of the tests
    try:
        for source in order["prelude"]:
            exec(compile(source, "<prelude>", "exec", dont_inherit=True), space)
    except BaseException as error:
        return say({"failure": told(error)})
    say({"ready": True})
    module = ModuleType("program")  # not "__main__": code under that name is not run
    module.__dict__["__builtins__"] = builtins
    sys.modules["program"] = sys.modules["__main__"] = module
    for name in ("confine", "runner", "examine", "completion"):
        sys.modules.pop(name, None)
    try:
        sources, found = find_program(order["answer"], order["prompt"], names)
        loaded = dumps({"found": found}).encode() + b"\n"
        for source in sources:
            exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit too
        return say({"failure": f"the program can't be run: {told(error)}"})
    return examine(own, loaded, names, module.__dict__, space)
