"""What test-time training tells people: progress while a context is adapted to, how a fit ended, where its parts are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import Config, Dgd, TinyPair
from test_ttt_runs import FIT, fit_yaml, text_file

ARMS = [{"name": "adapted", "method": "speculative", "ttt": True}]
LINES = {"callbacks": [{"class_path": "DecodeProgress", "init_args": {"line_every": 0}}]}


@pytest.mark.parametrize("rehearsals", [0, 2])
def test_progress_tells_of_adaptation(rehearsals: int, config: Config, dgd: Dgd, contexts: Path) -> None:
    model = {"arms": ARMS, "ttt": {**FIT, "rehearsals": rehearsals}}
    run = dgd("predict", "--config", config(model, {"path": str(contexts), "clbench": False}, LINES))
    assert run.code == 0, run.err
    told = [line.split("; ", 1)[1] for line in run.out.splitlines() if "adapting to c3" in line]
    phases = ["the target reads it", *["the target rehearses"] * bool(rehearsals), "the draft learns"]
    assert told[: len(phases)] == [f"adapting to c3… {phase}" for phase in phases]
    steps = told[len(phases) :]
    assert 0 < len(steps) <= FIT["steps"]  # it may stop early
    assert steps == [f"adapting to c3… step {step}/{FIT['steps']}" for step in range(1, len(steps) + 1)]
