"""What a run prints: a line per arm, and all tables only where --verbose asks for them; the run itself is the same."""

from __future__ import annotations

import json
from pathlib import Path

from cli_tools import Config, Dgd

HISTOGRAM = "Tokens per verification"  # the title of a table for those who ask


def test_a_run_prints_its_arms_and_tables_on_request(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    guided = {"name": "g", "method": {"class_path": "Guided", "init_args": {"beta": 0.3}}, "temperature": 0.5}
    path = config(model={"arms": [{"name": "ar", "method": "Autoregressive"}, guided], "max_new_tokens": 4})
    quiet = dgd("predict", "--config", path)
    assert quiet.code == 0, quiet.err
    lines = quiet.out.splitlines()
    assert lines[:2] == ["arm ar: Autoregressive; greedy", "arm g: Guided, beta 0.3, readout draft; temperature 0.5"]
    folder = tmp_path / "logs/run"
    details = (folder / "version_0/summary.txt").read_text()
    verbose = dgd("predict", "--config", path, "--verbose")
    assert verbose.code == 0, verbose.err
    assert HISTOGRAM in details
    assert HISTOGRAM in verbose.out
    assert HISTOGRAM not in quiet.out
    hashes = {json.loads((folder / f"version_{n}/provenance.json").read_text())["config_hash"] for n in (0, 1)}
    assert len(hashes) == 1
