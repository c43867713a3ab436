"""`model.divergence` in `dgd predict`: rows, TensorBoard, a continued run, the lab, case studies, mistakes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import SHORT_FIT, Config, Dgd, TinyPair, check_error, predictions, ranks_of
from fork_server import launched
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgd_lightning import Noise, load_pair, run_folder
from dgd_lightning.methods.guided import Guided
from dgd_lightning.modules.group_decoder import GroupDecoder
from dgd_lightning.modules.rows import DivergenceSettings, divergence_record

SINGLE = 1e-6  # TensorBoard keeps scalars in fp32
ARMS: list[dict[str, Any]] = [
    {"name": "target", "method": "Autoregressive"},
    {"name": "nothing", "method": {"class_path": "Guided", "init_args": {"beta": 0.0}}},
    {"name": "draft", "method": {"class_path": "Guided", "init_args": {"beta": 0.5}}},
    {
        "name": "noise",
        "method": {"class_path": "Guided", "init_args": {"beta": 0.5, "readout": {"class_path": "Noise"}}},
    },
]
TASKS = 6


def run_of(tmp_path: Path, logs: str = "logs") -> Path:
    return tmp_path / logs / "run" / "version_0"


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return events.Reload()


def test_rows_curves_and_tables(config: Config, dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    path = config({"arms": ARMS, "divergence": {"top": 3}}, trainer={"callbacks": [{"class_path": "CaseStudies"}]})
    run = dgd("predict", "--config", path)
    assert run.code == 0, run.err
    rows = predictions(run_of(tmp_path))
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    made = {
        "target": None,
        "nothing": Guided(0.0).guidance_of({}),
        "draft": Guided(0.5).guidance_of({}),
        "noise": Guided(0.5, readout=Noise()).guidance_of({}),
    }
    by_arm: dict[str, list[dict[str, Any]]] = {name: [] for name in made}
    for row in rows:
        record = row["dgd"]
        prompt, answer = torch.tensor(record["prompt_ids"]), torch.tensor(record["output_ids"])
        assert record["divergence"] == divergence_record(
            pair, made[record["arm"]], prompt, answer, DivergenceSettings(top=3)
        )
        by_arm[record["arm"]].append(record["divergence"])
    changed = {arm: sum(sum(record["argmax_changed"]) for record in found) for arm, found in by_arm.items()}
    assert changed["target"] == changed["nothing"] == 0
    assert min(changed["draft"], changed["noise"]) > 0
    assert [r["js"] for r in by_arm["target"]] == [r["js"] for r in by_arm["nothing"]]  # the same tokens and readout

    events, tags = events_of(run_of(tmp_path)), events_of(run_of(tmp_path)).Tags()
    for arm, found in by_arm.items():
        values = [js for record in found for js in record["js"]]
        last = events.Scalars(f"{arm}/divergence/js")[-1]
        assert last.step == TASKS
        assert last.value == pytest.approx(sum(values) / len(values), abs=SINGLE)
        by_position = events.Scalars(f"{arm}/divergence_by_position/js")
        assert [point.step for point in by_position] == list(range(max(len(record["js"]) for record in found)))
        assert by_position[0].value == pytest.approx(sum(r["js"][0] for r in found) / TASKS, abs=SINGLE)
        assert len(events.Scalars(f"{arm}/divergence_by_context/js")) == 4
        assert f"{arm}/divergence/js" in tags["histograms"]
        assert events.Histograms(f"{arm}/divergence/js")[-1].histogram_value.num == len(values)
        assert not any(tag.startswith(f"{arm}/divergence_interval/") for tag in tags["scalars"])  # of four contexts
    pictures = [tag for tag in tags["images"] if tag.startswith("divergence t")]
    assert len(pictures) == 4 * len(ARMS)
    assert imread(io.BytesIO(events.Images(pictures[0])[-1].encoded_image_string)).ndim == 3
    assert "divergence_by_position" in tags["images"]
    kept = (run_of(tmp_path) / "summary.txt").read_text()
    assert "Divergence of target and readout" in kept
    assert "β 0.5, 4 contexts" in kept
    assert "case studies: " in run.out
    page = (run_of(tmp_path) / "case_studies.html").read_text()
    assert page.count("<section") == TASKS
    assert page.count("<article>") == TASKS * len(ARMS)


def test_a_continued_run_counts_every_row_once(
    config: Config, dgd: Dgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config({"arms": ARMS[1:3], "divergence": {}, "warmup": True})
    assert dgd("predict", "--config", path).code == 0
    folder = run_of(tmp_path)
    before = list(run_folder.read_predictions(folder))
    lines = (folder / run_folder.PREDICTIONS).read_text().splitlines(keepends=True)
    (folder / "DONE").unlink()
    (folder / run_folder.PREDICTIONS).unlink()
    for events in folder.glob("events.*"):
        events.unlink()
    kept = [line for line in lines if '"idx": "t0-' in line]  # a whole group
    run_folder.shard(folder, 0).write_text("".join(kept) + lines[-1][:200])  # and a torn row
    decoded: list[int] = []
    decode = GroupDecoder._decode
    monkeypatch.setattr(GroupDecoder, "_decode", lambda *a: (decoded.append(len(a[3])), decode(*a))[1])
    assert dgd("predict", "--config", path).code == 0
    assert sum(decoded) == 2 + 2 * (TASKS - 2)  # the warm-up's and those of the other tasks
    assert [r["dgd"]["divergence"] for r in run_folder.read_predictions(folder)] == [
        r["dgd"]["divergence"] for r in before
    ]
    steps = [point.step for point in events_of(folder).Scalars("draft/divergence/js")]
    assert steps[-2:] == [TASKS, TASKS]  # live and final
    assert not (tmp_path / "logs/run/version_1").exists()


@pytest.mark.slow
def test_two_ranks_equal_one(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    path = config({"arms": ARMS, "divergence": {}}, trainer={"callbacks": [{"class_path": "CaseStudies"}]})
    launched("predict", "--config", path, *ranks_of(2), "--logs_dir", tmp_path / "two").check_returncode()
    assert dgd("predict", "--config", path).code == 0
    assert predictions(run_of(tmp_path, "two")) == predictions(run_of(tmp_path))
    pages = {(run_of(tmp_path, logs) / "case_studies.html").read_text() for logs in ("two", "logs")}
    assert len(pages) == 1
    final = [events_of(run_of(tmp_path, logs)).Scalars("draft/divergence/js")[-1] for logs in ("two", "logs")]
    assert (final[0].step, final[0].value) == (final[1].step, final[1].value)


def test_without_it_nothing_is_replayed_and_other_settings_are_another_run(
    config: Config, dgd: Dgd, tmp_path: Path
) -> None:
    model = {"arms": [{"name": "target", "method": "Autoregressive"}], "max_new_tokens": 4}
    hashes = set()
    for version, divergence in enumerate((None, {}, {"top": 2})):
        assert dgd("predict", "--config", config({**model, "divergence": divergence})).code == 0
        rows = predictions(tmp_path / "logs" / "run" / f"version_{version}")
        assert all(("divergence" in row["dgd"]) is (divergence is not None) for row in rows)
        hashes |= {row["dgd"]["config_hash"] for row in rows}
    assert len(hashes) == 3
    alone = config({**model, "draft": None, "divergence": {}})
    run = dgd("predict", "--config", alone)
    assert run.code == 0
    rows = predictions(tmp_path / "logs" / "run" / "version_3")
    assert [row["dgd"]["divergence"] for row in rows] == [None] * TASKS
    assert "Divergence" not in (tmp_path / "logs/run/version_3/summary.txt").read_text()


def test_an_adapted_arm_is_compared_with_its_adapted_draft(
    config: Config, dgd: Dgd, contexts: Path, tmp_path: Path
) -> None:
    arms = [
        {"name": "plain", "method": "Autoregressive"},
        {"name": "guided", "method": {"class_path": "Guided", "init_args": {"beta": 0.0}}},
        {"name": "adapted", "method": {"class_path": "Guided", "init_args": {"beta": 0.0}}, "ttt": True},
    ]
    data = {"path": str(contexts), "batch_size": 2, "clbench": False}
    assert dgd("predict", "--config", config({"arms": arms, "ttt": SHORT_FIT, "divergence": {}}, data)).code == 0
    found: dict[str, list[Any]] = {arm["name"]: [] for arm in arms}
    for row in predictions(run_of(tmp_path)):
        found[row["dgd"]["arm"]].append([row["dgd"]["output_ids"], row["dgd"]["divergence"]["js"]])
    assert found["plain"] == found["guided"]
    assert [ids for ids, _ in found["adapted"]] == [ids for ids, _ in found["plain"]]
    assert all(a[1] != b[1] for a, b in zip(found["adapted"], found["plain"], strict=True))


@pytest.mark.parametrize(
    ("model", "trainer", "argument", "word"),
    [
        ({"divergence": {"top": -1}}, {}, "model.divergence.top", "at least 0"),
        ({}, {"callbacks": [{"class_path": "DivergenceMetrics"}]}, "model.divergence", "null"),
        (
            {"divergence": {}},
            {"callbacks": [{"class_path": "CaseStudies", "init_args": {"limit": 0}}]},
            "CaseStudies.limit",
            "at least 1",
        ),
    ],
)
def test_mistakes_are_one_line(
    config: Config, dgd: Dgd, model: dict[str, Any], trainer: dict[str, Any], argument: str, word: str
) -> None:
    check_error(dgd("predict", "--config", config({"arms": ARMS[:1], **model}, trainer=trainer)), argument, word)


def test_the_labs_config(dgd: Dgd, tmp_path: Path) -> None:
    """The shipped file on three tasks: the draft agrees with the target more than its shuffled control does."""
    path = Path(__file__).parents[2] / "configs" / "guided" / "divergence.yaml"
    run = dgd("predict", "--config", path, "--data.limit", "3", "--logs_dir", tmp_path, "--trainer.accelerator", "cpu")
    assert run.code == 0, run.err
    folder = tmp_path / "guided-divergence" / "version_0"
    agree: dict[str, float] = {}
    for row in predictions(folder):
        found = row["dgd"]["divergence"]
        assert "".join(found["tokens"]).startswith(row["model_output"])
        agree[row["dgd"]["arm"]] = agree.get(row["dgd"]["arm"], 0) + sum(found["agree"]) / len(found["agree"]) / 3
    assert agree["draft 0.3"] > agree["shuffled 0.3"] + 0.2
    page = (folder / "case_studies.html").read_text()
    assert page.count('class="sign"') >= 3 * 4
