"""The suite runs offline: `conftest.py` says so before anything imports the Hub's client."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled


def test_the_hub_is_never_asked() -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(OfflineModeIsEnabled):
        huggingface_hub.HfApi().model_info("org/name")
