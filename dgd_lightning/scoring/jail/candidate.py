"""The untrusted side: an interpreter that runs the program and answers calls. It knows no tests and no verdict."""

import os
import socket
import sys
import types
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path += sys.argv[1:]  # installed packages, behind the standard library
from completion import find_program
from wire import Channel, decode, encode

CHANNEL = 3  # file descriptor


class Host:
    """The program's module, and objects of it that the tests refer to by number."""

    def __init__(self) -> None:
        self.module = types.ModuleType("program")  # not "__main__": code under that name is not run
        sys.modules["program"] = self.module
        self.objects: list[Any] = []

    def perform(self, message: dict[str, Any]) -> Any:
        """Do what a message asks, and give the result."""
        if message["do"] == "load":
            program = find_program(message["answer"], message["prompt"], message["names"])
            for source in program.sources:
                exec(compile(source, "<program>", "exec", dont_inherit=True), self.module.__dict__)
            return program.found
        target = self.resolve(message["target"])
        if message["do"] == "get":
            return getattr(target, message["name"])
        if message["do"] == "set":
            return setattr(target, message["name"], decode(message["value"], self.resolve))
        return target(*decode(message["args"], self.resolve), **decode(message["kwargs"], self.resolve))

    def refer(self, value: Any) -> int:
        """Keep an object here."""
        self.objects.append(value)
        return len(self.objects) - 1

    def resolve(self, key: str | int) -> Any:
        """An object that was kept, or one of the program's globals."""
        return self.objects[key] if isinstance(key, int) else self.module.__dict__[key]


def main() -> None:
    """Answer until nobody asks."""
    channel, host = Channel(socket.socket(fileno=CHANNEL)), Host()
    while True:
        try:
            message = channel.receive()
        except EOFError:
            os._exit(0)
        try:
            reply = {"id": message["id"], "value": encode(host.perform(message), host.refer)}
        except BaseException as error:  # SystemExit too: the program's end is the tests' to decide
            reply = {"id": message["id"], "raised": [type(error).__name__, str(error)[:1000]]}
        try:
            channel.send(reply)
        except ValueError as error:
            channel.send({"id": message["id"], "raised": ["ValueError", str(error)[:1000]]})


if __name__ == "__main__":
    main()
