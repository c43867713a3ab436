"""The draft's hyperparameters: read from, and written as, the published ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from dgd_lightning.checks import check_integer
from dgd_lightning.errors import InputError
from dgd_lightning.target.folder import is_integer, read_field, read_list, read_mapping, read_number, read_rope

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the sequence length
ARCHITECTURE = "DFlashDraftModel"
# Sizes that every file must have, and those it may leave out, under their published names.
_SIZES = {name: name for name in ("hidden_size", "intermediate_size", "vocab_size", "num_target_layers")}
_SIZES |= {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
_OPTIONAL = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "max_positions": "max_position_embeddings"}
_OTHER_HEADS = ("domino", "dspark", "eagle", "speculator")
# Settings of `dflash_config` that change what is computed; a draft that turns one on is another network.
_FOREIGN_SETTINGS = """
    shift_label pure_draft_prefix_len enable_confidence_head markov_rank gru_hidden_dim emb_dim causal is_causal
    sample_from_anchor
""".split()
# Settings, here or at the top level, that scale what is computed, with the values at which they do nothing.
_SCALES = {"output_multiplier": 1, "final_logit_softcapping": 0, "input_embedding_scale": 1}
# Keys that saving writes in another spelling, or that are no longer true of what it writes.
_NOT_CARRIED = ("rope_parameters", "partial_rotary_factor", "auto_map", "dtype", "torch_dtype", "transformers_version")
_HINT = "use a draft whose config.json is consistent"


@dataclass(frozen=True)
class DraftConfig:
    """What defines a DFlash draft.

    ``target_layer_ids`` are 0-based decoder layers of the target: id ``i`` is transformers' ``hidden_states[i + 1]``.
    ``extra`` carries every other key of the file it was read from, so that saving loses nothing.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    attention_bias: bool = False
    max_positions: int = 40960
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in (*_SIZES, "num_kv_heads", "head_dim"):
            check_integer(f"draft.{name}", getattr(self, name), hint=_HINT)
        check_integer("draft.block_size", self.block_size, least=2, hint=_HINT)
        check_integer("draft.mask_token_id", self.mask_token_id, least=0, hint=_HINT)
        if self.num_heads % self.num_kv_heads:
            expected = f"a multiple of num_key_value_heads = {self.num_kv_heads}"
            raise InputError("draft.num_attention_heads", expected=expected, received=self.num_heads, hint=_HINT)
        if self.head_dim % 2:
            raise InputError("draft.head_dim", expected="an even number", received=self.head_dim, hint=_HINT)
        layers = range(self.num_target_layers)
        if not self.target_layer_ids or not all(is_integer(i) and i in layers for i in self.target_layer_ids):
            expected, received = f"ids of the target's layers, 0…{layers[-1]}", list(self.target_layer_ids)
            raise InputError("draft.target_layer_ids", expected=expected, received=received, hint=_HINT)

    @property
    def num_features(self) -> int:
        """F·H, the width of the tapped features."""
        return len(self.target_layer_ids) * self.hidden_size

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a published ``config.json`` (z-lab, SpecForge; rope in 4.x or 5.x spelling).

        Raises:
            InputError: for what this network is not (another head, sliding-window layers), and for missing keys.
        """
        _refuse_other_formats(raw)
        settings = {k: v for k, v in read_mapping(raw, "dflash_config", "draft").items() if v is not None}
        sizes = {name: _need(raw, key) for name, key in _SIZES.items()}
        _refuse_sliding(raw, sizes["num_layers"])
        # z-lab's code asks dflash_config first
        ids = read_list(settings, "target_layer_ids", "draft") or read_list(raw, "target_layer_ids", "draft")
        defaults = (sizes["num_heads"], sizes["hidden_size"] // sizes["num_heads"], 40960)
        for (name, key), default in zip(_OPTIONAL.items(), defaults, strict=True):
            sizes[name] = read_field(raw, key, "draft", "an integer", is_integer, default)
        bias = read_field(raw, "attention_bias", "draft", "true or false", lambda value: isinstance(value, bool), False)
        theta, scaling = _rope(raw)
        return cls(
            **sizes,
            block_size=_block_size(raw, settings),
            mask_token_id=_need({**raw, **settings}, "mask_token_id"),
            target_layer_ids=tuple(ids or default_layer_ids(sizes["num_target_layers"], sizes["num_layers"])),
            rms_norm_eps=read_number(raw, "rms_norm_eps", "draft", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=bias,
            extra={k: v for k, v in raw.items() if k not in _NOT_CARRIED},
        )

    def to_dict(self) -> dict[str, Any]:
        """The published layout, in the 4.x spelling of rope, which every reader still understands."""
        settings = dict(self.extra.get("dflash_config") or {})
        settings |= {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_layer_ids)}
        written = {
            **{key: getattr(self, name) for name, key in (_SIZES | _OPTIONAL).items()},
            "architectures": [ARCHITECTURE],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "block_size": self.block_size,
            "dflash_config": settings,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "layer_types": ["full_attention"] * self.num_layers,
            "max_window_layers": self.num_layers,
            "model_type": "qwen3",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "rope_theta": self.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": False,
        }
        # A file that gave these at the top level too keeps them there, in agreement.
        written |= {k: settings[k] for k in ("mask_token_id", "target_layer_ids") if k in self.extra}
        return {**self.extra, **written}


def default_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Tapped layers where the config names none: one per draft layer, evenly from layer 1 to layer L − 3.

    A single draft layer taps the middle. Halves round to even, as the published drafts were built (z-lab/dflash).
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    step = (num_target_layers - 4) / (num_draft_layers - 1)
    return tuple(round(1 + i * step) for i in range(num_draft_layers))


def _need(raw: Mapping[str, Any], key: str) -> int:
    """An integer ≥ 0 that the file must have; sizes are at least 1, or dividing by them would fail first."""
    if raw.get(key) is None:
        raise InputError("draft", expected=f"a DFlash config.json with {key!r}", received="none", hint=_HINT)
    return check_integer(f"draft.{key}", raw[key], least=int(key != "mask_token_id"), hint=_HINT)


def _block_size(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """From the top level or ``dflash_config``: readers differ in which they ask, so both must say the same."""
    outer, inner = raw.get("block_size"), settings.get("block_size")
    if outer is not None and inner is not None and outer != inner:
        received = f"{outer} at the top level, {inner} in dflash_config"
        hint = "keep the size that the draft was trained with"
        raise InputError("draft.block_size", expected="one block_size", received=received, hint=hint)
    return _need({"block_size": inner if outer is None else outer}, "block_size")


def _refuse_other_formats(raw: Mapping[str, Any]) -> None:
    if "speculators_model_type" in raw or "transformer_layer_config" in raw:
        raise InputError(
            "draft",
            expected="a draft in the published z-lab or SpecForge layout",
            received="a speculators export (speculators_model_type / transformer_layer_config)",
            hint="use the draft's original checkpoint; drafts with their own vocabulary are not supported",
        )
    settings = read_mapping(raw, "dflash_config", "draft")
    names = [str(a) for a in read_list(raw, "architectures", "draft")]
    head = settings.get("projector_type") or raw.get("projector_type") or "dflash"
    other = next((n for n in [*names, str(head)] if any(o in n.lower() for o in _OTHER_HEADS)), None)
    foreign = next((k for k in _FOREIGN_SETTINGS if settings.get(k) or (k != "emb_dim" and raw.get(k))), None)
    if other or foreign or head != "dflash":
        received = other or (f"dflash_config.{foreign} = {settings.get(foreign)!r}" if foreign else head)
        hint = "Domino, DSpark, EAGLE and speculators heads are not supported: use a DFlash checkpoint"
        raise InputError("draft", expected="a plain DFlash draft (projector_type dflash)", received=received, hint=hint)
    for where, given in (("dflash_config.", settings), ("", raw)):
        for key, neutral in _SCALES.items():
            if given.get(key) not in (None, neutral):
                expected = f"none, or {neutral}, at which it does nothing"
                hint = "drafts that scale their input or their logits are not supported"
                raise InputError(f"draft.{where}{key}", expected=expected, received=repr(given[key]), hint=hint)
    if (names and ARCHITECTURE not in names) or not ("dflash_config" in raw or "block_size" in raw):
        raise InputError(
            "draft",
            expected=f"a DFlash draft (architectures: [{ARCHITECTURE}])",
            received=names or "a config.json without dflash_config and block_size",
            hint="give the draft's folder or Hub id, e.g. z-lab/Qwen3-8B-DFlash-b16",
        )
    if raw.get("draft_vocab_size") not in (None, raw.get("vocab_size")):
        received = f"draft_vocab_size = {raw['draft_vocab_size']}"
        hint = "drafts with a vocabulary head of their own are not supported"
        raise InputError("draft", expected="a draft that speaks the target's vocabulary", received=received, hint=hint)
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError("draft", expected="hidden_act silu", received=raw["hidden_act"], hint=_HINT)


def _refuse_sliding(raw: Mapping[str, Any], num_layers: int) -> None:
    if raw.get("layer_types") is not None:
        types = read_list(raw, "layer_types", "draft")
    else:  # transformers' own rule for files that do not list the layers
        slides = bool(raw.get("use_sliding_window")) and raw.get("sliding_window") is not None
        first = read_field(raw, "max_window_layers", "draft", "an integer", is_integer, num_layers)
        types = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(num_layers)]
    if len(types) != num_layers or any(t != "full_attention" for t in types):
        hint = "drafts with sliding-window layers are not supported: use a full-attention draft"
        raise InputError("draft.layer_types", expected=f"{num_layers} × full_attention", received=types, hint=hint)


def _rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None)."""
    theta, params = read_rope(raw, "draft")
    kind = params["rope_type"]
    partial = params.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if kind not in SUPPORTED_ROPE or partial != 1.0:
        raise InputError(
            "draft.rope_parameters",
            expected=f"a rope_type of {', '.join(SUPPORTED_ROPE)} over the whole head",
            received=f"{kind}, partial_rotary_factor {partial}",
            hint="use a draft with one of these",
        )
    return theta, None if kind == "default" else params
