"""Makes runs of the command within one process parse quicker: what jsonargparse has worked out once, it is told again.

A nested class is parsed anew for defaults, links and validation, so a class in a class in a list is parsed dozens of
times in a run, and again in the next run of the tests. Only results are kept, never mistakes; processes of their own
(:mod:`fork_server`, real interpreters) parse without it.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Hashable
from enum import Enum
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace, _common, _typehints
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

PLAIN = (str, int, float, bool, type(None), Enum, Path)
# What a result depends on besides the arguments.
NAMES = ("lenient_check", "parsing_defaults", "validating_defaults", "load_value_mode", "sub_defaults", "dump_kwargs")
FLAGS = [getattr(module, name) for module in (_common, _typehints) for name in NAMES if hasattr(module, name)]
# Another version may name them otherwise: results are not remembered then, which is slower and right.
KNOWN = all(any(hasattr(module, name) for module in (_common, _typehints)) for name in NAMES)


class _Unknown(Exception):
    """A value that can't be a part of a key."""


def _frozen(value: Any) -> Hashable:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return dict, tuple((key, _frozen(one)) for key, one in value.items())
    if isinstance(value, list | tuple | set):
        return type(value), tuple(map(_frozen, value))
    if not isinstance(value, PLAIN):
        raise _Unknown
    return type(value), value


def _remembering(adapt: Callable[..., Any], known: dict[Hashable, Any]) -> Callable[..., Any]:
    signature = inspect.signature(adapt)

    def adapted(*values: Any, **named: Any) -> Any:
        arguments = dict(signature.bind(*values, **named).arguments)
        try:
            before = arguments.get("prev_val") or {}  # changed in its place where another class comes after it
            changed = "class_path" in before and before["class_path"] != arguments["value"]["class_path"]
            if changed or arguments["instantiate_classes"] or arguments["sub_add_kwargs"].get("linked_targets"):
                raise _Unknown
            kinds = _typehints.import_object(arguments["value"]["class_path"]), str(arguments.pop("typehint", None))
            merging = _typehints.adapt_typehints.__name__  # jsonargparse's way, or ours
            key = (kinds, merging, os.getcwd(), _frozen(arguments), *(_frozen(flag.get()) for flag in FLAGS))
        except (_Unknown, KeyError, TypeError, ValueError, ImportError, AttributeError):
            return adapt(*values, **named)
        if key not in known:
            known[key] = copy.deepcopy(adapt(*values, **named))
        return copy.deepcopy(known[key])

    return adapted


def _once(set_up: Callable[..., None], known: dict[Hashable, dict[str, Any]]) -> Callable[..., None]:
    names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")

    def setup_parser(self: LightningCLI, *arguments: Any) -> None:
        key = (type(self), *self.subcommands())
        if key not in known:
            set_up(self, *arguments)
            known[key] = {name: getattr(self, name) for name in names}
        vars(self).update(known[key])

    return setup_parser


def patch(patches: pytest.MonkeyPatch) -> None:
    """Until the patches are undone, parsers are built once and their results are remembered."""
    if KNOWN:
        patches.setattr(_typehints, "adapt_class_type", _remembering(_typehints.adapt_class_type, {}))
    patches.setattr(LightningCLI, "setup_parser", _once(LightningCLI.setup_parser, {}))
    # What is written into the run folder has just been parsed: it is not checked a second and a third time.
    patches.setattr(LightningArgumentParser, "save", partialmethod(LightningArgumentParser.save, skip_validation=True))
