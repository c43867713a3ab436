"""README and docs: no wide line, every link leads somewhere, every configuration that is named is there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from test_rooms import ROOMS

from dgd_lightning import (
    AblatedDraft,
    Adaptive,
    DoLa,
    DraftReadout,
    Guided,
    LogitLens,
    MatchedEntropy,
    Noise,
    OtherModel,
    Rerank,
    Speculative,
    WarmUp,
    WithoutContext,
)
from dgd_lightning.modules.arms import Arm

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


def test_the_list_of_rooms_is_the_one_that_is_checked() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("| room |")[1].split("\n\n")[0]
    assert [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)/?`", line.split("|")[1])] == ROOMS


@pytest.mark.parametrize("kind", [Arm, Speculative, Guided, Rerank])
def test_every_argument_of_a_method_is_explained(kind: type[Any]) -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    section = text.split("## `Autoregressive`")[0] if kind is Arm else text.split(f"## `{kind.__name__}`")[1]
    check_named(kind, section.split("\n## ")[0])


@pytest.mark.parametrize("kind", [DraftReadout, LogitLens, DoLa, OtherModel, WithoutContext, AblatedDraft])
def test_every_argument_of_a_readout_is_explained(kind: type[Any]) -> None:
    text = (ROOT / "docs" / "readouts.md").read_text(encoding="utf-8")
    check_named(kind, text.split(f"**`{kind.__name__}`**")[1].split("\n**")[0])


@pytest.mark.parametrize("kind", [Noise, MatchedEntropy, WarmUp, Adaptive])
def test_every_argument_of_controls_and_schedules_is_explained(kind: type[Any]) -> None:
    text = (ROOT / "docs" / "readouts.md").read_text(encoding="utf-8")
    check_named(kind, next(line for line in text.splitlines() if line.startswith(f"| `{kind.__name__}`")))


def check_named(kind: type[Any], text: str) -> None:
    missing = [field.name for field in fields(kind) if f"`{field.name}`" not in text]
    assert not missing, f"{kind.__name__}: {', '.join(missing)}"


@pytest.mark.parametrize("name", ["methods.md", "readouts.md"])
def test_documented_arms_can_be_made(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--arms", type=list[Arm])
    made = []
    for text in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.S):
        part = yaml.safe_load(text)
        if isinstance(part, dict):
            part = part.get("arms") or [
                {"name": "a", "method": {"class_path": "Guided", "init_args": {"beta": 1, **part}}}
            ]
        made += parser.instantiate_classes(parser.parse_object({"arms": part})).arms
    for arm in made:
        arm.check()
    assert len(made) >= 5
