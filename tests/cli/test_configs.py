"""Every YAML under configs/ parses against the real signatures."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgd_lightning.cli_lightning import ProjectCLI, import_plugins

CONFIGS = Path(__file__).parents[2] / "configs"


class Parsed(Exception):
    """Raised where parsing is over and building would begin."""


class ParseOnly(ProjectCLI):
    def before_instantiate_classes(self) -> None:
        raise Parsed


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_parses(path: Path) -> None:
    subcommand = "fit" if "raining" in path.read_text() else "predict"  # DraftTraining, TargetPretraining
    import_plugins()
    with pytest.raises(Parsed):
        ParseOnly([subcommand, "--config", str(path)])
