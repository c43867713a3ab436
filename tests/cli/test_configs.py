"""Every YAML under configs/ parses against the real signatures."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cli_tools import Dgd
from fork_server import launched

from dgd_lightning.commands.given import given
from dgd_lightning.commands.lightning import ProjectCLI, import_plugins
from dgd_lightning.commands.mistakes import check_given
from dgd_lightning.commands.sweep import parse_options as parse_sweep
from dgd_lightning.commands.sweep import read_setting
from dgd_lightning.commands.trials import trial_command

CONFIGS = Path(__file__).parents[2] / "configs"


class Parsed(Exception):
    """Raised where parsing is over and building would begin."""


class ParseOnly(ProjectCLI):
    def before_instantiate_classes(self) -> None:
        raise Parsed


def model_of(path: Path) -> str:
    return str(yaml.safe_load(path.read_text())["model"]["class_path"])


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)  # a sweep names its base from there
    if path.parent.name == "sweeps":
        options = parse_sweep(["--config", str(path)])
        assert (CONFIGS.parent / options.base).is_file()
        import_plugins()
        settings = [read_setting(key, value) for key, value in options.search.items()]
        values = {one.key: one.values or (one.low, one.high) for one in settings}
        for number in range(max(map(len, values.values()))):  # as many trials as it takes to have named every value
            with pytest.raises(Parsed):
                ParseOnly(trial_command(options.base, {key: some[number % len(some)] for key, some in values.items()}))
        return
    subcommand = {"Decoding": "predict", "Diagnostic": "test"}.get(model_of(path), "fit")
    import_plugins()
    with pytest.raises(Parsed):
        ParseOnly([subcommand, "--config", str(path)])


def test_what_the_tests_remember_of_parsing_is_what_is_parsed(dgd: Dgd, tmp_path: Path) -> None:
    """Twice with their shortcut, once without, as a user's run parses."""
    command = ["predict", "--config", str(CONFIGS / "quickstart.yaml"), "--print_config"]
    whole = launched(*command).stdout
    assert "class_path: dgd_lightning.modules.decoding.Decoding" in whole
    assert [dgd(*command).out for _ in range(2)] == [whole] * 2
    (tmp_path / "saved.yaml").write_text(whole)  # as a run folder has it: nothing in it is taken for a mistake
    check_given("predict", given(["predict", "--config", str(tmp_path / "saved.yaml")]))
