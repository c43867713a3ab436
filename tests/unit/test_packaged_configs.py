"""Configurations by name: a local file first, then the packaged one; `dgd configs` lists and copies them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dgd_lightning.cli import main
from dgd_lightning.commands.configs import FOLDER, config_path, packaged, with_paths
from dgd_lightning.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Outside the clone, where nothing is called like a packaged configuration."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_configuration_has_a_name() -> None:
    files = {path.resolve() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {path.resolve() for path in packaged().values()} == files
    assert next(iter(packaged())) == "quickstart"


@pytest.mark.parametrize("name", packaged())
def test_a_configuration_says_what_it_is_and_how_it_is_run(name: str) -> None:
    what, how = packaged()[name].read_text(encoding="utf-8").splitlines()[:2]
    assert re.fullmatch(r"# [^`]{20,117}[.?]", what)
    assert re.match(rf"# dgd (predict|fit|test|sweep) --config {name}( |$)", how)


@pytest.mark.parametrize("name", ["guided/lab", "guided/lab.yaml"])
def test_a_name_finds_the_packaged_file_with_or_without_its_suffix(name: str) -> None:
    expected = str(FOLDER / "guided/lab.yaml")
    assert with_paths(["predict", "--config", name, "--data.seed", "1"]) == [
        "predict", "--config", expected, "--data.seed", "1"
    ]  # fmt: skip
    assert with_paths(["predict", f"--config={name}", "-c", name]) == [
        "predict",
        f"--config={expected}",
        "-c",
        expected,
    ]


def test_a_local_file_goes_first_and_a_folder_does_not(elsewhere: Path) -> None:
    (elsewhere / "quickstart").mkdir()
    assert config_path("quickstart") == str(FOLDER / "quickstart.yaml")
    (elsewhere / "quickstart").rmdir()
    (elsewhere / "quickstart").write_text("name: mine\n")
    assert config_path("quickstart") == "quickstart"


@pytest.mark.parametrize("given", ["-", "name: mine", "{name: mine}"])
def test_what_is_no_name_is_left_to_the_parser(given: str) -> None:
    assert config_path(given) == given


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("qickstart", "did you mean quickstart?"),
        ("lab.yaml", "did you mean diagnostic/lab or guided/lab or power/lab or ttt/lab?"),
        ("configs/guided/rerank.yaml", "did you mean guided/rerank?"),
        ("../quickstart", "did you mean quickstart?"),
        ("zebra", "see `dgd configs`"),
    ],
)
def test_an_unknown_name_is_one_line_with_what_is_near(given: str, hint: str) -> None:
    with pytest.raises(InputError, match=r"^--config: .* `dgd configs` lists") as error:
        config_path(given)
    assert error.value.hint.endswith(hint)


def test_configs_lists_all_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(packaged())
    assert "bundled pair" in lines[0]
    assert {line.split()[1] for line in lines} == {"predict", "fit", "test", "sweep"}


def test_configs_copies_one_and_overwrites_nothing(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "diagnostic/ttt"]) == 0
    assert capsys.readouterr().out == "ttt.yaml: dgd test --config ttt.yaml\n"
    assert (elsewhere / "ttt.yaml").read_bytes() == (ROOT / "configs/diagnostic/ttt.yaml").read_bytes()
    (elsewhere / "ttt.yaml").write_text("mine")
    (elsewhere / "deep").mkdir()
    assert main(["configs", "sweeps/ttt"]) == 2
    assert "file: expected a new file" in capsys.readouterr().err
    assert (elsewhere / "ttt.yaml").read_text() == "mine"
    assert main(["configs", "ttt/text.yaml", "deep/own.yaml"]) == 0
    assert main(["configs", "ttt/text", "deep"]) == 0
    assert {path.name for path in (elsewhere / "deep").iterdir()} == {"own.yaml", "text.yaml"}
    assert main(["configs", "ttt/text", "nowhere/own.yaml"]) == 2
    assert main(["configs", "ttt/txt"]) == 2
    assert "did you mean ttt/text" in capsys.readouterr().err
