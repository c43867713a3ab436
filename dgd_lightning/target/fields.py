"""Typed reading of a checkpoint's ``config.json``: a value of another type is one InputError that names its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError

HINT = "use a checkpoint whose config.json is consistent"
# What transformers needs of a scaled rope before it can turn anything.
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_NUMBERS = (
    *_ROPE_NEEDS["llama3"],
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


class Rope(NamedTuple):
    """The rotary embedding as a file spells it."""

    theta: float
    kind: str
    params: dict[str, Any]  # what else the file says of it


def is_integer(value: object) -> bool:
    """Whether a value is an integer; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; JSON's true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_mapping(raw: Mapping[str, Any], key: str, argument: str) -> dict[str, Any]:
    """An object, empty where the key is absent or null.

    Raises:
        InputError: it is something else.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{argument}.{key}", expected="an object", received=repr(value), hint=HINT)
    return dict(value or {})


def read_list(raw: Mapping[str, Any], key: str, argument: str) -> list[Any] | None:
    """A list, None where the key is absent or null.

    Raises:
        InputError: it is something else.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, list | tuple):
        raise InputError(f"{argument}.{key}", expected="a list", received=repr(value), hint=HINT)
    return None if value is None else list(value)


def read_integer(raw: Mapping[str, Any], key: str, argument: str, default: int | None = None) -> int:
    """An integer.

    Raises:
        InputError: it is something else, or is absent (or null) and there is no default.
    """
    value = default if raw.get(key) is None else raw[key]
    if value is None or not is_integer(value):
        raise InputError(f"{argument}.{key}", expected="an integer", received=repr(value), hint=HINT)
    return value


def read_number(raw: Mapping[str, Any], key: str, argument: str, default: float | None = None) -> float:
    """A finite number above 0.

    Raises:
        InputError: it is something else (null too), or is absent and there is no default.
    """
    value = raw.get(key, default)
    if value is None or not is_number(value) or value <= 0:
        raise InputError(f"{argument}.{key}", expected="a number above 0", received=repr(value), hint=HINT)
    return float(value)


def read_rope(raw: Mapping[str, Any], argument: str) -> Rope:
    """The rope of ``rope_parameters`` (5.x) or ``rope_theta`` + ``rope_scaling`` (4.x).

    Raises:
        InputError: a value is of another type, or one that the kind of rope needs is absent.
    """
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    params = read_mapping(raw, key, argument)
    inner, where = params.pop("rope_theta", None), f"{argument}.{key}"
    if inner is not None:
        theta = read_number({"rope_theta": inner}, "rope_theta", where)
    else:
        theta = 10000.0 if raw.get("rope_theta") is None else read_number(raw, "rope_theta", argument)
    old = params.pop("type", None)
    kind = params.get("rope_type") or old or "default"
    if not isinstance(kind, str):
        raise InputError(f"{where}.rope_type", expected="a name", received=repr(kind), hint=HINT)
    for name in _ROPE_NEEDS.get(kind, ()):
        read_number(params, name, where)
    for name in _ROPE_NUMBERS:
        if params.get(name) is not None and not is_number(params[name]):
            raise InputError(f"{where}.{name}", expected="a number", received=repr(params[name]), hint=HINT)
    return Rope(theta, kind, params)
