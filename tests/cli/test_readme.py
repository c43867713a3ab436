"""The README's Python example runs, and its two commands stand as agreed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("After blue comes teal.")


def test_commands_stand_as_agreed() -> None:
    setup = "python3 -m venv .venv && .venv/bin/pip install -e "
    assert f"{setup}. && .venv/bin/dgd predict --config configs/quickstart.yaml" in README
    assert f'{setup}".[dev]" && .venv/bin/pytest' in README
    assert f'{setup}".[dev]" && .venv/bin/pytest' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", re.findall(r"\]\(((?:docs|configs)/[^)]*)\)", README))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / name).exists()
