"""README and docs: no wide line, every link leads somewhere, every configuration that is named is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md")]
WIDTH = 120


def heading(title: str) -> str:
    """As GitHub makes a link of it."""
    return re.sub(r"[^\w\- ]", "", title.lstrip("# ").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_fit_and_their_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []
    for link in re.findall(r"\]\(([^)]*)\)", text):
        path, _, title = link.partition("#")
        if "://" in path:
            continue
        there = page.parent / path if path else page
        assert there.exists(), link
        if title:
            lines = there.read_text(encoding="utf-8").splitlines()
            assert title in [heading(line) for line in lines if line.startswith("#")], link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_configurations_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"--config ([^\s`)\"]+)", text):
        known = (ROOT / name).is_file() or (ROOT / "configs" / f"{name}.yaml").is_file()
        assert known or name in ("my_training_prompts.yaml", "judge.yaml"), name
    for name in re.findall(r"`(configs/\S+\.yaml)`", text):
        assert (ROOT / name).is_file(), name
