"""Checks of single arguments: each returns the value, or raises the one-line `InputError` that names it."""

import difflib
import math
from collections.abc import Collection
from typing import Any

from dgd_lightning.errors import InputError


def check_integer(
    name: str, value: Any, *, least: int = 1, most: int | None = None, optional: bool = False, hint: str = ""
) -> Any:
    """An integer (no True, no 3.0) within ``least`` … ``most``; None too where it is ``optional``."""
    if optional and value is None:
        return value
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fine or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        expected = f"an integer {bounds}" + (", or null" if optional else "")
        raise InputError(name, expected=expected, received=repr(value), hint=hint or f"use e.g. {least}")
    return value


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    optional: bool = False,
    hint: str = "",
) -> Any:
    """A finite number, ``least`` ≤ value ≤ ``most``, ``above`` < value < ``below``; or None where ``optional``."""
    if optional and value is None:
        return value
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (real and least <= value <= most and above < value < below):
        words = (("at least", least), ("above", above), ("at most", most), ("below", below))
        bounds = " and ".join(f"{word} {bound:g}" for word, bound in words if math.isfinite(bound))
        expected = "a finite number" + f" {bounds}" * bool(bounds) + (", or null" if optional else "")
        raise InputError(name, expected=expected, received=repr(value), hint=hint or "correct the value")
    return value


def check_unicode(name: str, text: str) -> str:
    """A text without half characters (lone surrogates), which JSON can escape and UTF-8 can't hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        received = f"half a character (a lone surrogate) at place {error.start}"
        raise InputError(name, expected="Unicode text", received=received, hint="remove it from the data") from error
    return text


def check_folder_name(name: str, value: str) -> str:
    """The name of a folder (``a``), or of one in another (``a/b``), which can't lead out of where it goes."""
    if {"", ".", ".."} & {*value.split("/")} or not value.isprintable() or "\\" in value:
        raise InputError(
            name,
            expected="the name of a folder inside logs_dir",
            received=repr(value),
            hint="use letters, digits, '-', '_' and '.'; where the folder goes is for logs_dir to say",
        )
    return value


def check_choice(name: str, value: Any, choices: Collection[Any], *, hint: str = "") -> Any:
    """One of ``choices``; a near miss is suggested."""
    if value not in choices:
        words = [str(choice) for choice in choices]
        close = difflib.get_close_matches(str(value), words, n=1)
        way_out = f"did you mean {close[0]}?" if close else hint or f"use {words[0]}"
        raise InputError(name, expected=" or ".join(words), received=repr(value), hint=way_out)
    return value
