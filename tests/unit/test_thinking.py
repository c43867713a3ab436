"""The warning about thinking: published Qwen3 drafts never saw it, so τ drops where it is on."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
from tiny import make_pair

from dgd_lightning.methods.autoregressive import Autoregressive
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.modules.arms import Arm
from dgd_lightning.modules.decoding import Decoding
from dgd_lightning.pair import Pair


@pytest.mark.parametrize(
    ("family", "thinking", "draft", "warned"),
    [
        ("qwen3", True, True, True),
        ("qwen3_moe", True, True, True),
        ("qwen3", False, True, False),
        ("qwen3", True, False, False),  # no draft, no τ
        ("llama", True, True, False),  # its template knows no thinking
    ],
)
def test_warning(monkeypatch: pytest.MonkeyPatch, family: str, thinking: bool, draft: bool, warned: bool) -> None:
    pair = make_pair(family)
    arm = Arm("arm", Speculative() if draft else Autoregressive())
    module = Decoding("target", "draft" if draft else None, [arm], enable_thinking=thinking)
    loaded = pair if draft else Pair(pair.target, None, None)
    monkeypatch.setattr(module.source, "load", lambda trainer: loaded)
    strategy = SimpleNamespace(broadcast=lambda value: value)
    monkeypatch.setattr(
        Decoding,
        "trainer",
        SimpleNamespace(precision="32-true", log_dir=None, datamodule=None, strategy=strategy, world_size=1),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.setup("predict")
    found = [str(warning.message) for warning in caught if "enable_thinking" in str(warning.message)]
    assert len(found) == warned
    assert all("trained without thinking; τ will drop" in message for message in found)
