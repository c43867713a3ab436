"""Arms in the form of before version 0.2 get one error that shows the new form of that arm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dgd_lightning.errors import InputError
from dgd_lightning.old_rows import upgraded_arm

OPTION = re.compile(r"--model(\.init_args)?\.arms\+?(=(?P<value>.*))?", re.S)


def check_arms_form(argv: Sequence[str]) -> None:
    """Looks at the arms of config files and of ``--model.arms``; what can't be read is left to the parser.

    Raises:
        InputError: one has the old form.
    """
    for arm in _arms(argv):
        if not isinstance(arm, dict) or (new := upgraded_arm(arm)) is None:
            continue
        beside = ", ".join(key for key in arm if key != "method" and key not in new)
        shown = yaml.safe_dump(new, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
        raise InputError(
            f"model.arms[{arm.get('name')}].method",
            expected="a method's class, with its settings in init_args",
            received=f"{arm.get('method', 'nothing')}{f' and {beside} beside it' if beside else ''} (the form of before 0.2)",
            hint=f"write {shown}",
        )


def _arms(argv: Sequence[str]) -> Iterator[Any]:
    for place, argument in enumerate(argv):
        before, following = argv[place - 1] if place else "", "".join(argv[place + 1 : place + 2])
        found = None
        if before in ("-c", "--config") or argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
            config = _read(path) if path.is_file() else None
            model = config.get("model") if isinstance(config, dict) else None
            found = (model.get("init_args") or model).get("arms") if isinstance(model, dict) else None
        elif match := OPTION.fullmatch(argument):
            found = _read(match["value"] if match["value"] is not None else following)
        yield from found if isinstance(found, list) else [found]


def _read(source: Path | str) -> Any:
    try:
        return yaml.safe_load(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except (OSError, ValueError, yaml.YAMLError):
        return None
