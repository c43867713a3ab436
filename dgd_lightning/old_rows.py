"""Rows, and arms of configurations, from before version 0.2 in today's form. No other file knows the old names."""

from typing import Any

METHODS = {"autoregressive": "Autoregressive", "speculative": "Speculative", "guided": "Guided", "rerank": "Rerank"}
BLEND = ("beta", "readout", "space", "candidates", "plausibility", "schedule")  # candidates: tokens
SETTINGS = {
    "autoregressive": (),
    "speculative": ("block_size", "scheme"),
    "guided": (*BLEND, "block_size"),
    "rerank": ("rank_by", "num_answers", "betas", "block_size"),
}
KNOBS = {"scheme", "token_by_token", "guidance", *BLEND, *SETTINGS["rerank"]} - {"block_size"}  # no longer beside `arm`
NAMES = {  # anywhere in ``dgd``
    "num_candidates": "num_answers",
    "ttt_rehearsal_seconds": "ttt_validation_seconds",
    "rehearsals": "validation_texts",
    "rehearsed_answers": "validation_answers",
    "train_rehearsals": "train_texts",
    "changed": "argmax_changed",
    "moved": "tv_target_guided",
}


def is_old(row: dict[str, Any]) -> bool:
    """Whether a prediction row was written before version 0.2."""
    return row["dgd"].get("method") in list(METHODS)  # a list: what another program wrote there may not be hashable


def upgraded(row: dict[str, Any]) -> dict[str, Any]:
    """The row in today's form; one that has it already, or that another program wrote, as it is."""
    if not is_old(row):
        return row
    record = _renamed(row["dgd"])
    if isinstance(record.get("candidates"), list):
        record["answers"] = record.pop("candidates")
    for name in ("ttt", "divergence"):
        if isinstance(record.get(name), dict):
            record[name] = _renamed(record[name])
    if (record.get("ttt") or {}).get("held_out_by") == "rehearsals":
        record["ttt"]["held_out_by"] = "validation_texts"
    method, guidance = record["method"], record.get("guidance")
    settings = {name: record[name] for name in SETTINGS[method] if name in record}
    if method == "guided":
        settings["speculative"] = not record.get("token_by_token", False)
    new = {
        **{name: value for name, value in record.items() if name not in KNOBS},
        "method": METHODS[method],
        "settings": {**settings, **(guidance or {})},
        "lossless": method in ("autoregressive", "speculative"),  # answers have the target's own distribution
        "baseline": method == "autoregressive",
        "blends": method == "guided" or guidance is not None,
    }
    if "acceptance_lengths" in record:
        answers = record.get("answers")
        lengths = record["acceptance_lengths"] if answers is None else [one["tokens"] - 1 for one in answers]
        new["decoded_tokens"] = sum(lengths)
    return {**row, "dgd": new}


def upgraded_arm(arm: dict[str, Any]) -> dict[str, Any] | None:
    """An arm of a configuration in today's form, its method's settings in ``init_args``; None where it is in it."""
    method = arm.get("method", "speculative")
    beside = [key for key in arm if key in {*KNOBS, *NAMES, "block_size"}]
    if not isinstance(method, str) or not (beside or method in METHODS):
        return None
    settings = {NAMES.get(key, key): arm[key] for key in beside}
    if "token_by_token" in settings:
        settings["speculative"] = not settings.pop("token_by_token")
    kind = METHODS.get(method, method)
    kept = {key: value for key, value in arm.items() if key not in ("method", *beside)}
    return {**kept, "method": {"class_path": kind, "init_args": settings} if settings else kind}


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    return {NAMES.get(name, name): value for name, value in record.items()}
