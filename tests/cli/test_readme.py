"""The README's Python example runs, and its two commands stand as agreed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    names: dict[str, Any] = {}
    for example in examples:  # the later ones go on from the first
        exec(compile(example, "README.md", "exec"), names)
    answer, forwards = capsys.readouterr().out.splitlines()
    assert "Bani owes Gabi four sacks" in answer
    plain, fast, adapted = map(int, re.findall(r"\d+", forwards))
    assert adapted < 0.6 * fast <= 0.6 * plain
    printed = re.search(r'"verifications"\)  # (.*)', README)
    assert printed is not None
    assert forwards == f"{printed[1]} verifications"


def test_commands_stand_as_agreed() -> None:
    setup = "python3 -m venv .venv && .venv/bin/pip install -e "
    assert f"{setup}. && .venv/bin/dgd predict --config configs/quickstart.yaml" in README
    assert f'{setup}".[dev]" && .venv/bin/pytest' in README
    assert f'{setup}".[dev]" && .venv/bin/pytest' in (ROOT / ".ci" / "run").read_text()
