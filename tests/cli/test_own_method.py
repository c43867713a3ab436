"""A method of a user's own, in a file of the user's, goes through everything without a change to the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cli_tools import Dgd, predictions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgd_lightning import run_folder

METHOD = '''"""Draw several answers, keep the most frequent one."""

from collections import Counter
from dataclasses import dataclass

from dgd_lightning import Autoregressive, InputError, Method, choose_among


@dataclass(frozen=True)
class MostFrequent(Method):
    """The most frequent of several drawn answers.

    Args:
        count: answers per prompt.
    """

    count: int = 3

    def __post_init__(self):
        if self.count < 1:
            raise InputError("count", expected="at least 1", received=self.count, hint="use 3")

    def generate(self, pair, prompts, call):
        seeds = None if call.seed is None else [seed + number for seed in call.seed for number in range(self.count)]
        drawn = Autoregressive().generate(pair, prompts, call._replace(seed=seeds, num_return_sequences=self.count))
        return [self.best(drawn[at : at + self.count]) for at in range(0, len(drawn), self.count)]

    def best(self, answers):
        votes = Counter(tuple(one.tokens.tolist()) for one in answers)
        scores = [votes[tuple(one.tokens.tolist())] for one in answers]
        return choose_among(answers, scores.index(max(scores)), scores=scores)

    def record(self, output):
        return {"votes": int(max(one.score for one in output.trace.answers))}
'''
TASKS = 4


def settings(tmp_path: Path) -> Path:
    arms = [
        {"name": "drawn", "method": "Autoregressive", "temperature": 1.0},
        {
            "name": "votes",
            "method": {"class_path": "most_frequent_method.MostFrequent", "init_args": {"count": 5}},
            "temperature": 1.0,
        },
    ]
    model = {"target": "lab", "draft": "lab", "arms": arms, "max_new_tokens": 16, "cpu_threads": 1, "warmup": False}
    data = {"families": ["tariff", "ledger"], "contexts_per_family": 1, "batch_size": 2, "limit": TASKS}
    callbacks = [{"class_path": "CLBenchScorer"}, {"class_path": "CaseStudies"}]
    path = tmp_path / "own.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "Decoding", "init_args": model},
                "data": {"class_path": "LabContexts", "init_args": data},
                "trainer": {"accelerator": "cpu", "devices": 1, "callbacks": callbacks},
                "logs_dir": str(tmp_path / "logs"),
            }
        )
    )
    return path


def test_a_method_of_ones_own_goes_everywhere(dgd: Dgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(METHOD.splitlines()) <= 40
    (tmp_path / "most_frequent_method.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    path, folder = settings(tmp_path), tmp_path / "logs" / "own" / "version_0"
    run = dgd("predict", "--config", path)
    assert run.code == 0, run.err

    rows = predictions(folder)
    votes = [row["dgd"] for row in rows if row["dgd"]["arm"] == "votes"]
    assert len(votes) == TASKS
    for row, record in ((row, row["dgd"]) for row in rows if row["dgd"]["arm"] == "votes"):
        assert (record["method"], record["settings"]) == ("most_frequent_method.MostFrequent", {"count": 5})
        assert [record["lossless"], record["baseline"], record["blends"]] == [False, False, False]
        texts = [one["text"] for one in record["answers"]]
        assert texts.count(row["model_output"]) == record["votes"] == max(map(texts.count, texts))
        assert record["decoded_tokens"] == sum(one["tokens"] - 1 for one in record["answers"])
        assert len({one["seed"] for one in record["answers"]}) == 5
    assert any(len({one["text"] for one in record["answers"]}) > 1 for record in votes)
    assert "votes" in run.out

    # A killed run goes on with the same rows.
    lines = (folder / run_folder.PREDICTIONS).read_text().splitlines(keepends=True)
    (folder / "DONE").unlink()
    (folder / run_folder.PREDICTIONS).unlink()
    run_folder.shard(folder, 0).write_text("".join(lines[:3]) + lines[3][:50])
    assert dgd("predict", "--config", path).code == 0
    assert predictions(folder) == rows

    # Curves, scores, report, pages.
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert "votes/tau_micro" in tags
    assert any(tag.startswith("votes/solve_rate/") for tag in tags)
    assert "of which number" in (folder / "case_studies.html").read_text()
    assert dgd("score", folder).code == 0
    report = dgd("report", folder)
    assert report.code == 0, report.err
    assert "votes" in report.out

    bad = dgd(
        "predict",
        "--config",
        path,
        "--model.arms",
        "[{name: v, method: {class_path: most_frequent_method.MostFrequent, init_args: {count: 0}}}]",
    )
    assert bad.code == 2
    assert "count: expected at least 1, received 0" in bad.err
