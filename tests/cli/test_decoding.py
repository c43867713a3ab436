"""`Decoding` beside its decoders: devices, arms, warm-up, and what tells one checkpoint from another."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_tools import SHORT, Config, Dgd, TinyPair
from hub_cache import NEW, OLD, add_snapshot, set_ref, use
from tiny import make_pair

from dgd_lightning.callbacks.progress import DecodeProgress
from dgd_lightning.decode.call import Call, Progress
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.dola import DoLa
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.errors import InputError
from dgd_lightning.methods.guided import Guided
from dgd_lightning.methods.rerank import Rerank
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.modules.arms import Arm, check_arms, check_on_pair
from dgd_lightning.modules.decoding import Decoding
from dgd_lightning.modules.group_decoder import GroupDecoder
from dgd_lightning.modules.pair_source import PairSource


def device_of(device_map: Any, ranks: int = 1) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cuda:3"))
    trainer = SimpleNamespace(world_size=ranks, strategy=strategy)
    return PairSource("target", None, device_map=device_map)._placement(trainer)


def test_device_map() -> None:
    assert device_of(None) == device_of(None, ranks=2) == torch.device("cuda:3")
    assert device_of("auto") == "balanced"  # load_target's own "auto" is one device
    assert device_of("sequential") == "sequential"
    assert device_of({"": 1}) == {"": 1}
    for spread in ("auto", {"": 1}):
        with pytest.raises(InputError, match=r"^model\.device_map: .*with 2 ranks"):
            device_of(spread, ranks=2)


@pytest.mark.parametrize(
    ("setting", "argument"),
    [
        ({"temperature": 1e-6}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
    ],
)
def test_arms_are_named_in_errors(setting: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError) as error:
        check_arms([Arm("good", Speculative()), Arm("bad", Speculative(), **setting)], "draft")
    assert error.value.argument == f"model.arms[bad].{argument}"


def test_block_sizes() -> None:
    pair = make_pair(block_size=4)
    check_on_pair(
        [Arm("a", Speculative()), Arm("b", Speculative(2)), Arm("c", Speculative(4)), Arm("d", Guided(0.1))], pair
    )
    for method in (Speculative(5), Guided(0.1, block_size=5), Rerank(block_size=5)):
        with pytest.raises(InputError, match=r"^model\.arms\[b\]\.method\.block_size: expected an integer from 2 to 4"):
            check_on_pair([Arm("a", Speculative()), Arm("b", method)], pair)
    with pytest.raises(InputError, match=r"^block_size: expected an integer of at least 2"):
        Speculative(1)


@pytest.mark.parametrize(
    ("readout", "field"),
    [
        (LogitLens(9), "readout.layer"),
        (DoLa([0, 9]), "readout.layer_ids"),
        (Noise(LogitLens(9)), "readout.like.layer"),
    ],
)
def test_what_a_readout_lacks_names_it_and_its_arm(readout: Readout, field: str) -> None:
    arms = [Arm("a", Guided(0.1)), Arm("b", Guided(0.1, readout=readout))]
    with pytest.raises(InputError) as error:
        check_on_pair(arms, make_pair(block_size=4))
    assert error.value.argument == f"model.arms[b].method.{field}"


def test_hub_ids_are_told_apart_by_commit(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, logs = tmp_path / "hub", tmp_path / "logs" / "run"
    for hub_id, folder in (("org/target", tiny_pair.target), ("org/draft", tiny_pair.draft)):
        for commit in (OLD, NEW):
            add_snapshot(cache, hub_id, commit, folder)
        set_ref(cache, hub_id, "main", OLD)
    use(cache, monkeypatch)
    arms = [{"name": "dflash", "method": "Speculative"}]
    model = {"target": "org/target", "draft": "org/draft", "arms": arms, "max_new_tokens": 2}
    path = config(model=model)
    assert dgd("predict", "--config", path).code == 0
    named = json.loads((logs / "version_0" / "provenance.json").read_text())["model"]
    assert (named["target"], named["draft"]) == (f"org/target@{OLD}", f"org/draft@{OLD}")

    (logs / "version_0" / "DONE").unlink()
    set_ref(cache, "org/draft", "main", NEW)  # the same command now means another draft
    assert dgd("predict", "--config", path).code == 0
    assert (logs / "version_1" / "DONE").exists()
    pinned = config(model={**model, "draft_revision": OLD})
    assert dgd("predict", "--config", pinned).code == 0  # the first run's commit by its name: that run goes on
    assert (logs / "version_0" / "DONE").exists()
    assert not (logs / "version_2").exists()

    run = dgd("predict", "--config", path, "--model.draft_revision", "v9")
    assert run.code == 2
    assert run.err.startswith("dgd: error: model.draft_revision: expected a revision of org/draft")
    assert len(run.err.splitlines()) == 1


@pytest.mark.parametrize("done", ["nothing", "first group", "all"])
def test_warm_up_wherever_a_group_is_left(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    calls: list[tuple[int, bool]] = []
    decode = GroupDecoder._decode

    def spy(self: GroupDecoder, arms: Any, methods: Any, prompts: Any, call: Call) -> Any:
        calls.append((call.max_new_tokens, self.on_progress is None))
        return decode(self, arms, methods, prompts, call)

    start = Decoding.on_predict_start

    def begin(self: Decoding) -> None:
        groups = self.trainer.datamodule.groups  # type: ignore[attr-defined]
        left = {"nothing": [], "first group": groups[:1], "all": groups}[done]
        self.done = {(task.idx, arm.name) for group in left for task in group for arm in self.arms}
        start(self)
        assert self.decoder is not None
        assert self.decoder.on_progress is not None

    monkeypatch.setattr(GroupDecoder, "_decode", spy)
    monkeypatch.setattr(Decoding, "on_predict_start", begin)
    assert dgd("predict", "--config", config({"warmup": True})).code == 0
    # Three arms are warmed up unseen, then decode the groups left in sight of the progress bar.
    left = {"nothing": 3, "first group": 2, "all": 0}[done]
    assert calls == [(8, True)] * (3 if left else 0) + [(SHORT, False)] * (3 * left)


def test_progress_announces_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = DecodeProgress()
    notes: list[str] = []
    monkeypatch.setattr(progress, "bar", SimpleNamespace(
        task_ids=[0], update=lambda task, completed, note: notes.append(note)))  # fmt: skip
    progress._within_group("ar", Progress(5, 2, 1, 1))
    progress._within_group("dflash", Progress(0, 0, 4, 4))  # at once, although the bar was just drawn
    assert notes[-1] == "dflash: prefill of 4 rows"


def test_progress_counts_all_batches_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch per context, as with adapters: what was decoded, and how fast, is that of both."""
    progress, clock = DecodeProgress(), [0.0]
    notes: list[str] = []
    monkeypatch.setattr("dgd_lightning.callbacks.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "_show_in_time", lambda note, begins: notes.append(note))
    states = [Progress(0, 0, 2, 2), Progress(2, 0, 2, 2), Progress(8, 4, 2, 2), Progress(14, 6, 2, 0)]
    for _ in range(2):  # another arm between them, and another group after them
        for second in range(2):
            for arm, seconds in (("a", 1.0), ("b", 100.0)):
                for state in states:  # a's prefill takes a second, which is none of decoding; then 2 in each batch
                    clock[0] += seconds
                    progress._within_group(arm, state)
                    if arm == "a" and state == states[-1]:
                        tau, tokens = 12 / 6, 14 * (second + 1)
                        assert notes[-1] == f"a: 0 rows active, {tokens} tokens, τ {tau:.2f}, 6.0 tokens/s"
        trainer = SimpleNamespace(is_global_zero=True)
        monkeypatch.setattr(progress, "_show", lambda note, last: None)
        progress.on_predict_batch_end(trainer, None, [])  # type: ignore[arg-type]
