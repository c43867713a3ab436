"""What a run does once a rank has no context left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_tools import Config, Dgd
from lightning.pytorch.strategies import SingleDeviceStrategy

from dgd_lightning.callbacks import PredictionWriter


def test_no_rank_waits_for_another_after_its_last_context(
    config: Config, dgd: Dgd, contexts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither Lightning, nor the module, nor any callback asks for a collective then: ranks may differ by hours."""
    asked: dict[bool, list[str]] = {False: [], True: []}  # by whether the last context is done
    done = False
    end = PredictionWriter.on_predict_epoch_end

    def last_context_done(*arguments: Any) -> None:
        nonlocal done
        done = True
        end(*arguments)

    def watch(name: str) -> None:
        real = getattr(SingleDeviceStrategy, name)
        seen = lambda *a, **k: (asked[done].append(f"{name}{a[1:]}"), real(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(SingleDeviceStrategy, name, seen)

    for name in ("barrier", "broadcast", "reduce", "all_gather"):
        watch(name)
    monkeypatch.setattr(PredictionWriter, "on_predict_epoch_end", last_context_done)
    arms = [{"name": "plain", "method": "Speculative"}, {"name": "adapted", "method": "Speculative", "ttt": True}]
    fit = {"steps": 1, "rank": 2, "anchors_per_step": 2, "validation_texts": 0}
    model = {"arms": arms, "ttt": fit, "max_new_tokens": 2, "divergence": {}}
    callbacks = [{"class_path": "CLBenchScorer"}, {"class_path": "CaseStudies"}]
    data = {"path": str(contexts), "clbench": False, "limit": 2}
    run = dgd("predict", "--config", config(model=model, data=data, trainer={"callbacks": callbacks}))
    assert run.code == 0, run.err
    assert asked[False]
    assert asked[True] == []
    assert (tmp_path / "logs/run/version_0/case_studies.html").exists()
