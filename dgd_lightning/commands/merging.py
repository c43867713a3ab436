"""How values of several files and of the command line become one: a later list or class takes an earlier one's place.

jsonargparse merges lists of equal length entry by entry, and hands arguments of one class on to another: what runs
would then be nobody's words.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pydoc import locate
from typing import Any

from jsonargparse import Namespace, _typehints


@contextmanager
def replacing() -> Iterator[None]:
    """While a parser reads, a list replaces a list, and another class path drops all that was set for the old one.

    ``key+`` goes on appending, and single keys below a class or a dictionary go on changing those alone.
    """
    adapt, discard = _typehints.adapt_typehints, _typehints.discard_init_args_on_class_path_change

    def adapt_anew(value: Any, *given: Any, **settings: Any) -> Any:
        if isinstance(value, list) and not settings.get("append"):
            settings["prev_val"] = None
        return adapt(value, *given, **settings)

    def discard_all(parser: Any, previous: Any, value: Any) -> None:
        if previous and "init_args" in previous and not _same(previous["class_path"], value["class_path"]):
            previous["init_args"] = Namespace()
            previous.pop("dict_kwargs", None)

    _typehints.adapt_typehints, _typehints.discard_init_args_on_class_path_change = adapt_anew, discard_all
    try:
        yield
    finally:
        _typehints.adapt_typehints, _typehints.discard_init_args_on_class_path_change = adapt, discard


def _same(one: str | None, other: str) -> bool:
    """Whether two class paths are of one class, which rooms and files may both have; None: none was named."""
    return one in (None, other) or locate(str(one)) is locate(other)
