"""TensorBoard holds what `dgd predict` promises; its numbers are made again from the prediction rows alone."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Config, Dgd
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgd_lightning import run_folder

K = 4  # block size of the tiny draft
ARMS = ("ar", "dflash", "warm")
TASKS = 6
SINGLE = 1e-6  # TensorBoard keeps scalars in fp32


class Run:
    """A run's events, and its records by arm."""

    def __init__(self, folder: Path) -> None:
        self.events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
        self.events.Reload()
        self.rows = list(run_folder.read_predictions(folder))

    def records(self, arm: str) -> list[dict[str, Any]]:
        return [row["dgd"] for row in self.rows if row["dgd"]["arm"] == arm]

    def final(self, tag: str) -> float:
        """The last value of a scalar; the x axis counts tasks."""
        last = self.events.Scalars(tag)[-1]
        assert last.step == TASKS
        return last.value

    def speed(self, arm: str) -> float:
        """Tokens per second of decode time; a row's share of its group's seconds goes by tokens."""
        records = self.records(arm)
        tokens = [sum(record["acceptance_lengths"]) for record in records]
        seconds = [r["decode_seconds"] * own / r["batch_tokens"] for r, own in zip(records, tokens, strict=True) if own]
        return sum(tokens) / sum(seconds)


@pytest.fixture
def run(config: Config, dgd: Dgd, tmp_path: Path) -> Run:
    assert dgd("predict", "--config", config()).code == 0
    return Run(tmp_path / "logs" / "run" / "version_0")


def test_tensorboard(run: Run) -> None:
    tags = run.events.Tags()
    scalars = {tag for tag in tags["scalars"] if tag.split("/")[0] in ARMS}
    plain = {f"{arm}/{name}" for arm in ARMS for name in ("tau_micro", "tau_macro", "tokens_per_second")}
    assert plain <= scalars
    # A speed-up needs an autoregressive arm of the same temperature: "warm" has none.
    assert {tag for tag in scalars if tag.endswith("speed_up")} == {"ar/speed_up", "dflash/speed_up"}

    for arm in ARMS:
        records = run.records(arm)
        assert len(records) == TASKS
        lengths = [record["acceptance_lengths"] for record in records]
        pooled = [length for row in lengths for length in row]
        assert len(set(pooled)) > 1 or arm != "warm"  # else every number below would be alike
        assert run.final(f"{arm}/tau_micro") == pytest.approx(sum(pooled) / len(pooled), rel=SINGLE)
        means = [record["tau"] for record in records if record["tau"] is not None]
        assert run.final(f"{arm}/tau_macro") == pytest.approx(sum(means) / len(means), rel=SINGLE)
        assert run.final(f"{arm}/tokens_per_second") == pytest.approx(run.speed(arm), rel=SINGLE)
        check_histogram(run, arm, pooled)
        if arm != "ar":
            check_slots(run, arm, [length for record in records for length in record["verified_lengths"]])
    assert run.final("ar/tau_micro") == run.final("ar/speed_up") == 1.0
    assert run.final("dflash/speed_up") == pytest.approx(run.speed("dflash") / run.speed("ar"), rel=SINGLE)
    assert not [tag for tag in scalars if tag.startswith("ar/acceptance")]  # it drafts nothing


def check_histogram(run: Run, arm: str, lengths: list[int]) -> None:
    """Buckets between half numbers hold how often each acceptance length came."""
    event = run.events.Histograms(f"{arm}/acceptance_length")[-1]
    value = event.histogram_value
    assert (event.step, value.num, value.sum) == (TASKS, len(lengths), sum(lengths))
    filled = {edge: count for edge, count in zip(value.bucket_limit, value.bucket, strict=True) if count}
    assert filled == {length + 0.5: count for length, count in Counter(lengths).items()}


def check_slots(run: Run, arm: str, lengths: list[int]) -> None:
    """Slot j was accepted in verifications longer than j, and reached in those at least as long."""
    for slot in range(1, K):
        accepted = sum(length > slot for length in lengths)
        reached = sum(length >= slot for length in lengths)
        overall = run.final(f"{arm}/acceptance/slot_{slot:02d}")
        assert overall == pytest.approx(accepted / len(lengths), rel=SINGLE)
        tag = f"{arm}/acceptance_given_reached/slot_{slot:02d}"
        if reached:
            assert run.final(tag) == pytest.approx(accepted / reached, rel=SINGLE)
        else:
            assert tag not in run.events.Tags()["scalars"]
    assert f"{arm}/acceptance/slot_{K:02d}" not in run.events.Tags()["scalars"]


def test_curve_and_samples(run: Run) -> None:
    assert run.events.Tags()["images"] == ["acceptance_curve"]
    (image,) = run.events.Images("acceptance_curve")
    assert image.step == TASKS
    pixels = imread(io.BytesIO(image.encoded_image_string), format="png")
    assert pixels.shape[:2] == (image.height, image.width) == (400, 600)
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2]).round(2).tolist()}) > 10  # it is drawn

    shown = {
        tag.removesuffix("/text_summary"): run.events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in run.events.Tags()["tensors"]
        if tag.startswith("sample ")
    }
    rows = run.rows[: 4 * len(ARMS)]  # of the first four tasks
    assert set(shown) == {f"sample {row['idx']}/{row['dgd']['arm']}" for row in rows}
    for row in rows:
        text = shown[f"sample {row['idx']}/{row['dgd']['arm']}"]
        assert text.split() == row["model_output"].split()
        assert all(line.startswith("    ") for line in text.split("\n") if line)  # Markdown shows it as it is
