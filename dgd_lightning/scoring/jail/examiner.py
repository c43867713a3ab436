"""The tests' side: runs the data set's tests against a program that lives in another sandbox, and says how it went.

Nothing of the program runs here. The tests call `Remote` stand-ins; arguments and results travel as plain values.
"""

import builtins
import ctypes
import os
import reprlib
import socket
import sys
import traceback
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from wire import Channel, decode, encode

CONTROL, CANDIDATE = 3, 4  # file descriptors: the grader's, the program's
shown = reprlib.Repr()
shown.maxstring = shown.maxother = shown.maxlong = 80


class ProgramError(Exception):
    """The program raised what is no built-in exception."""


class ProgramGone(BaseException):
    """The program ended or broke the protocol; no test's ``except Exception`` takes it for an answer."""


class Unsendable(BaseException):
    """A test wants to give the program what can't leave this interpreter: the tests' fault, not the program's."""


class Program:
    """Asks the program's interpreter."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.count = channel, 0
        self.gone: str | None = None  # why nothing can be asked any more
        self.last = ""  # the last call and what came of it, for people

    def ask(self, message: dict[str, Any]) -> Any:
        """Raises what the program raised, and ProgramGone where it ended or its answer is none."""
        if self.gone:
            raise ProgramGone(self.gone)
        self.count += 1
        try:
            self.channel.send({"id": self.count, **message})
            reply = self.channel.receive()
            if not isinstance(reply, dict) or reply.get("id") != self.count:
                raise ValueError("an answer that nobody asked for")
            if "raised" not in reply:
                return decode(reply["value"], lambda key: Remote(self, key))
            name, text = map(str, reply["raised"])
        except OSError:
            self.gone = "the program ended before it answered"
        except EOFError as error:
            self.gone = f"the program ended before it answered: {error}"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
            self.gone = f"the program's answer could not be read: {error}"
        if self.gone:
            raise ProgramGone(self.gone)
        raise _exception(name, text)


class Remote:
    """Stands for an object of the program: can be called; attributes can be read and set; is equal to itself alone."""

    __slots__ = ("_key", "_program")

    def __init__(self, program: Program, key: str | int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_key", key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sent = {"args": encode(list(args), _refer), "kwargs": encode(kwargs, _refer)}
        words = ", ".join([*map(shown.repr, args), *(f"{name}={shown.repr(value)}" for name, value in kwargs.items())])
        self._program.last = f"{self._key}({words})"
        result = self._program.ask({"do": "call", "target": self._key, **sent})
        self._program.last += f" gave {shown.repr(result)}"
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask({"do": "get", "target": self._key, "name": name})

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask({"do": "set", "target": self._key, "name": name, "value": encode(value, _refer)})

    def __repr__(self) -> str:
        return f"<an object of the program, {self._key}>"


def _refer(value: Any) -> str | int:
    if isinstance(value, Remote):
        return value._key
    raise Unsendable(f"a test gives the program a {type(value).__name__}, which can't be sent")


def _exception(name: str, text: str) -> Exception:
    """The built-in exception of a name. StopIteration and the like would end a test's own loop early: never those."""
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return ProgramError(f"{name}: {text}")
    if issubclass(kind, StopIteration | StopAsyncIteration | Warning):
        return RuntimeError(f"the program raised {name}")
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its like want more
        return ProgramError(f"{name}: {text}")


def examine(task: dict[str, Any], program: Program) -> dict[str, Any]:
    """Run a task's tests; see `code_grader.py` for its fields.

    Returns:
        ``passed`` (how many), ``failure`` (None where all passed), ``fault`` ("program" or "tests"), ``found``.
    """
    space: dict[str, Any] = {"__name__": "tests"}
    verdict: dict[str, Any] = {"passed": 0, "failure": None, "fault": "tests", "found": None}
    try:
        for number, source in enumerate(task["prelude"]):
            exec(compile(source, f"<prelude {number}>", "exec", dont_inherit=True), space)
        tests = [
            compile(source, f"<test {number}>", "exec", dont_inherit=True)
            for number, source in enumerate(task["tests"])
        ]
    except Exception as error:
        return verdict | {"failure": f"the tests can't be run: {type(error).__name__}: {error}"}
    space |= {name: Remote(program, name) for name in task["names"]}
    verdict["fault"], doing = "program", "the program can't be run: "
    try:
        load = {"do": "load", "answer": task["answer"], "prompt": task["prompt"], "names": task["names"]}
        verdict["found"] = str(program.ask(load))
        doing = ""
        for number, test in enumerate(tests):
            exec(test, space)
            if program.gone:  # and a test's bare `except` took it
                raise ProgramGone(program.gone)
            verdict["passed"] += number >= task["setup"]
    except Unsendable as error:
        verdict |= {"failure": str(error), "fault": "tests"}
    except BaseException as error:
        verdict["failure"] = doing + _told(error, task["tests"], program)
    return verdict


def _told(error: BaseException, tests: list[str], program: Program) -> str:
    """The error, the line of the test it came from, and the last call."""
    words = [f"{type(error).__name__}: {error}" if str(error) else type(error).__name__]
    if isinstance(error, ProgramGone):
        words = [str(error)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith("<test "):
            line = tests[int(frame.filename[6:-1])].split("\n")[(frame.lineno or 1) - 1].strip()
            words.append(f"in {line[:300]}")
            break
    return "; ".join([*words, program.last] if program.last else words)


def main() -> None:
    """Read the task, examine, write the verdict."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: where both run as one user, no debugger may attach
    control, candidate = Channel(socket.socket(fileno=CONTROL)), Channel(socket.socket(fileno=CANDIDATE))
    task = control.receive()
    control.send({"started": True})
    control.send(examine(task, Program(candidate)))
    os._exit(0)


if __name__ == "__main__":
    main()
