"""Plain values as JSON lines between the tests and the program under test, which trust each other in nothing.

A value arrives as a new object of a built-in type, so nothing a program defines (a lying ``__eq__``) ever reaches a
test. What is no plain value stays where it is and travels as a reference. Never pickle.
"""

import builtins
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

MAX_MESSAGE = 8 << 20  # bytes
MAX_ITEMS = 100_000  # of an iterator; it may have no end
HEX_BITS = 10_000  # longer integers go in hexadecimal, which takes linear time and has no limit of digits
BUILTIN = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
KINDS: dict[str, tuple[Any, Callable[[Any], Iterable[Any]], Callable[[list[Any]], Any]]] = {  # type, to and from parts
    "complex": (complex, lambda value: (value.real, value.imag), lambda items: complex(*map(float, items))),
    "range": (range, lambda value: (value.start, value.stop, value.step), lambda items: range(*items)),
    "dict": (dict, lambda value: map(list, value.items()), dict),
    "tuple": (tuple, iter, tuple),
    "frozenset": (frozenset, iter, frozenset),
    "set": (set, iter, set),
    "keys": (type({}.keys()), iter, lambda items: dict.fromkeys(items).keys()),
    "values": (type({}.values()), iter, lambda items: dict(enumerate(items)).values()),
    "items": (type({}.items()), iter, lambda items: dict(items).items()),
    "iterator": (Iterator, lambda value: islice(value, MAX_ITEMS), iter),
}


def encode(value: Any, refer: Callable[[Any], str | int]) -> Any:
    """JSON of a value; subclasses go as their base (a defaultdict as a dict).

    ``refer`` gives the name or number under which any other object stays behind, or raises.
    """
    match value:
        case None | bool():
            return value
        case int():
            return {"int": hex(value)} if value.bit_length() > HEX_BITS else int(value)
        case float():
            return float(value)
        case str():
            return str.__str__(value)
        case list():
            return [encode(item, refer) for item in value]
        case bytes() | bytearray():
            return {"bytearray" if isinstance(value, bytearray) else "bytes": value.decode("latin-1")}
    if isinstance(value, type) and BUILTIN.get(value.__name__) is value:
        return {"builtin": value.__name__}
    for name, (kind, parts, _) in KINDS.items():
        if isinstance(value, kind):
            return {name: [encode(item, refer) for item in parts(value)]}
    return {"reference": refer(value)}


def decode(data: Any, resolve: Callable[[str | int], Any]) -> Any:
    """The value again, of built-in types alone, of what `encode` gave or a hostile program sends.

    ``resolve`` says what a reference means here.

    Raises:
        ValueError, TypeError, KeyError: this is no encoded value.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    ((name, content),) = data.items()
    if name == "reference":
        if not isinstance(content, str | int):
            raise TypeError(f"reference: expected a name or a number, received {content!r}")
        return resolve(content)
    if name == "builtin":
        return BUILTIN[content]
    if name == "int":
        return int(str(content), 16)
    if name in ("bytes", "bytearray"):
        raw = str(content).encode("latin-1")
        return raw if name == "bytes" else bytearray(raw)
    if name not in KINDS:
        raise ValueError(f"expected an encoded value, received {name!r}")
    return KINDS[name][2]([decode(item, resolve) for item in content])


class Channel:
    """JSON lines over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.lines = connection.makefile("rb")

    def send(self, message: Any) -> None:
        """Raises ValueError where the message is too long, or JSON can't hold it."""
        data = json.dumps(message).encode() + b"\n"
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a value of {len(data):,} bytes; at most {MAX_MESSAGE:,} can be sent")
        self.connection.sendall(data)

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other side is gone, or sent a line without end.
            ValueError: this is no JSON.
        """
        line = self.lines.readline(MAX_MESSAGE + 1)
        if not line.endswith(b"\n"):
            raise EOFError("a message is too long" if len(line) > MAX_MESSAGE else "the other side is gone")
        return json.loads(line)
