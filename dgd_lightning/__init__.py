"""dgd-lightning: draft-guided decoding with test-time training.

The public API loads on first use, so that `dgd --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgd_lightning.decode import autoregressive_generate, guided_generate, speculative_generate
    from dgd_lightning.decode.ablation import AblatedDraft
    from dgd_lightning.decode.blending import Adaptive, Blend, Constant, Disagree, WarmUp
    from dgd_lightning.decode.controls import MatchedEntropy, Noise
    from dgd_lightning.decode.guided import Guidance, guided_sweep
    from dgd_lightning.decode.readouts import (
        DoLa,
        DraftReadout,
        LogitLens,
        OtherModel,
        WithoutContext,
    )
    from dgd_lightning.decode.rerank import rerank_generate
    from dgd_lightning.draft.adapter import Adapter, load_adapter, save_adapter
    from dgd_lightning.errors import InputError
    from dgd_lightning.pair import Pair, load_pair
    from dgd_lightning.ttt.adapt import AdaptResult, ttt_adapt
    from dgd_lightning.ttt.config import TTTConfig
    from dgd_lightning.ttt.online import OnlineTTT
    from dgd_lightning.types import AdaptTrace, DecodeOutput, DecodeTrace, HeldOutScore

__version__ = "0.2.0"
_HOMES = {
    "autoregressive_generate": "dgd_lightning.decode",
    "speculative_generate": "dgd_lightning.decode",
    "guided_generate": "dgd_lightning.decode",
    "AblatedDraft": "dgd_lightning.decode.ablation",
    "Guidance": "dgd_lightning.decode.guided",
    "guided_sweep": "dgd_lightning.decode.guided",
    "rerank_generate": "dgd_lightning.decode.rerank",
    "Blend": "dgd_lightning.decode.blending",
    "Adaptive": "dgd_lightning.decode.blending",
    "Constant": "dgd_lightning.decode.blending",
    "Disagree": "dgd_lightning.decode.blending",
    "WarmUp": "dgd_lightning.decode.blending",
    "DoLa": "dgd_lightning.decode.readouts",
    "DraftReadout": "dgd_lightning.decode.readouts",
    "LogitLens": "dgd_lightning.decode.readouts",
    "MatchedEntropy": "dgd_lightning.decode.controls",
    "Noise": "dgd_lightning.decode.controls",
    "OtherModel": "dgd_lightning.decode.readouts",
    "WithoutContext": "dgd_lightning.decode.readouts",
    "InputError": "dgd_lightning.errors",
    "Pair": "dgd_lightning.pair",
    "load_pair": "dgd_lightning.pair",
    "DecodeOutput": "dgd_lightning.types",
    "DecodeTrace": "dgd_lightning.types",
    "AdaptTrace": "dgd_lightning.types",
    "HeldOutScore": "dgd_lightning.types",
    "AdaptResult": "dgd_lightning.ttt.adapt",
    "ttt_adapt": "dgd_lightning.ttt.adapt",
    "TTTConfig": "dgd_lightning.ttt.config",
    "OnlineTTT": "dgd_lightning.ttt.online",
    "Adapter": "dgd_lightning.draft.adapter",
    "load_adapter": "dgd_lightning.draft.adapter",
    "save_adapter": "dgd_lightning.draft.adapter",
}
__all__ = [
    "AblatedDraft",
    "AdaptResult",
    "AdaptTrace",
    "Adapter",
    "Adaptive",
    "Blend",
    "Constant",
    "DecodeOutput",
    "DecodeTrace",
    "Disagree",
    "DoLa",
    "DraftReadout",
    "Guidance",
    "HeldOutScore",
    "InputError",
    "LogitLens",
    "MatchedEntropy",
    "Noise",
    "OnlineTTT",
    "OtherModel",
    "Pair",
    "TTTConfig",
    "WarmUp",
    "WithoutContext",
    "autoregressive_generate",
    "guided_generate",
    "guided_sweep",
    "load_adapter",
    "load_pair",
    "rerank_generate",
    "save_adapter",
    "speculative_generate",
    "ttt_adapt",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
