"""How files and the command line become one configuration: a later list or class takes an earlier one's place.

jsonargparse merges lists of equal length entry by entry, and hands arguments of one class on to another: what runs
would then be nobody's words. Of a key that stands twice in a mapping, YAML loaders take the last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import Namespace, _typehints, get_loader, set_loader


@contextmanager
def replacing() -> Iterator[None]:
    """While a parser reads, a list replaces a list, and another class path drops all that was set for the old one.

    ``key+`` goes on appending, and single keys below a class or a dictionary go on changing those alone. A key that
    stands twice is refused.
    """
    adapt, discard = _typehints.adapt_typehints, _typehints.discard_init_args_on_class_path_change
    load = get_loader("yaml")

    def adapt_anew(value: Any, *given: Any, **settings: Any) -> Any:
        if isinstance(value, list) and not settings.get("append"):
            settings["prev_val"] = None
        return adapt(value, *given, **settings)

    def discard_all(parser: Any, previous: Any, value: Any) -> None:
        if previous and not _same(previous.get("class_path"), value["class_path"]):
            previous["init_args"] = Namespace()
            previous.pop("dict_kwargs", None)

    def load_strictly(text: str) -> Any:
        refuse_repeated_keys(text)
        return load(text)

    _typehints.adapt_typehints = adapt_anew  # type: ignore[assignment]
    _typehints.discard_init_args_on_class_path_change = discard_all
    set_loader("yaml", load_strictly, (yaml.YAMLError,))
    try:
        yield
    finally:
        _typehints.adapt_typehints, _typehints.discard_init_args_on_class_path_change = adapt, discard
        set_loader("yaml", load, (yaml.YAMLError,))


def _same(one: str | None, other: str) -> bool:
    """Whether two class paths are of one class, which rooms and files may both have; None: none was named."""
    return one in (None, other) or locate(str(one)) is locate(other)


def refuse_repeated_keys(text: str) -> None:
    """Raises YAMLError where a mapping has a key twice, or holds itself, or the text is no YAML."""
    known: set[int] = set()

    def look(node: yaml.Node | None, around: frozenset[int]) -> None:
        if not isinstance(node, yaml.CollectionNode):
            return
        if id(node) in around:
            raise yaml.constructor.ConstructorError(None, None, "found a value that holds itself", node.start_mark)
        if id(node) in known:
            return
        known.add(id(node))
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if (key.tag, key.value) in [(one.tag, one.value) for one in keys[:place]]:
                raise yaml.constructor.ConstructorError(None, None, f"found {key.value!r} twice", key.start_mark)
        for one in [part for pair in pairs for part in pair] or node.value:
            look(one, around | {id(node)})

    look(yaml.compose(text, Loader=yaml.SafeLoader), frozenset())
