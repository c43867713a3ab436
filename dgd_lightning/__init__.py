# ruff: noqa: F401  (what is imported for type checkers is exported by `_HOMES`)
"""dgd-lightning: draft-guided decoding with test-time training.

The public API loads on first use, so that `dgd --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgd_lightning.decode.blending import Adaptive, Blend, Constant, Disagree, WarmUp
    from dgd_lightning.decode.call import Call
    from dgd_lightning.decode.prefix_cache import PrefixCache, make_prefix_cache
    from dgd_lightning.decode.readouts.ablated_draft import AblatedDraft
    from dgd_lightning.decode.readouts.base import Readout, ReadoutState
    from dgd_lightning.decode.readouts.dola import DoLa
    from dgd_lightning.decode.readouts.draft import DraftReadout
    from dgd_lightning.decode.readouts.logit_lens import LogitLens
    from dgd_lightning.decode.readouts.matched_entropy import MatchedEntropy
    from dgd_lightning.decode.readouts.noise import Noise
    from dgd_lightning.decode.readouts.other_model import OtherModel
    from dgd_lightning.decode.readouts.without_context import WithoutContext
    from dgd_lightning.draft.checkpoint import Adapter, load_adapter, save_adapter
    from dgd_lightning.errors import InputError
    from dgd_lightning.methods.autoregressive import Autoregressive, autoregressive_generate
    from dgd_lightning.methods.base import Guidance, Method, choose_among
    from dgd_lightning.methods.guided import Guided, guided_generate, guided_sweep
    from dgd_lightning.methods.majority import Majority
    from dgd_lightning.methods.power import Power, power_generate
    from dgd_lightning.methods.rerank import Rerank, rerank_generate
    from dgd_lightning.methods.speculative import Speculative, speculative_generate
    from dgd_lightning.pair import Pair, load_pair
    from dgd_lightning.ttt.adapt import AdaptResult, ttt_adapt
    from dgd_lightning.ttt.config import TTTConfig
    from dgd_lightning.ttt.online import OnlineTTT
    from dgd_lightning.types import AdaptTrace, DecodeOutput, DecodeTrace, HeldOutScore

__version__ = "0.2.0"
_HOMES = {
    "decode.blending": ["Adaptive", "Blend", "Constant", "Disagree", "WarmUp"],
    "decode.call": ["Call"],
    "decode.prefix_cache": ["PrefixCache", "make_prefix_cache"],
    "decode.readouts.ablated_draft": ["AblatedDraft"],
    "decode.readouts.base": ["Readout", "ReadoutState"],
    "decode.readouts.dola": ["DoLa"],
    "decode.readouts.draft": ["DraftReadout"],
    "decode.readouts.logit_lens": ["LogitLens"],
    "decode.readouts.matched_entropy": ["MatchedEntropy"],
    "decode.readouts.noise": ["Noise"],
    "decode.readouts.other_model": ["OtherModel"],
    "decode.readouts.without_context": ["WithoutContext"],
    "errors": ["InputError"],
    "methods.autoregressive": ["Autoregressive", "autoregressive_generate"],
    "methods.base": ["Guidance", "Method", "choose_among"],
    "methods.guided": ["Guided", "guided_generate", "guided_sweep"],
    "methods.majority": ["Majority"],
    "methods.power": ["Power", "power_generate"],
    "methods.rerank": ["Rerank", "rerank_generate"],
    "methods.speculative": ["Speculative", "speculative_generate"],
    "pair": ["Pair", "load_pair"],
    "ttt.adapt": ["AdaptResult", "ttt_adapt"],
    "ttt.config": ["TTTConfig"],
    "draft.checkpoint": ["Adapter", "load_adapter", "save_adapter"],
    "ttt.online": ["OnlineTTT"],
    "types": ["AdaptTrace", "DecodeOutput", "DecodeTrace", "HeldOutScore"],
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
