"""A checkpoint's folder, bundled, local or from the Hugging Face Hub: its weights, its JSON files and their fields."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dgd_lightning.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
BUNDLED = "lab"  # the name of the bundled pair, as a target or as a draft
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja")
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # of safetensors headers
HINT = "use a checkpoint whose config.json is consistent"
# What transformers needs of a scaled rope before it can turn anything.
_ROPE_NEEDS = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_NUMBERS = (*_ROPE_NEEDS["llama3"], "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def bundled(source: str | os.PathLike[str], part: str) -> str:
    """The folder of the bundled pair's part (``target`` or ``draft``) for ``lab``; any other source as it is."""
    name = os.fspath(source)
    return str(files("dgd_lightning").joinpath("lab", "assets", part)) if name == BUNDLED else name


def local_folder(argument: str, name_or_path: str | os.PathLike[str]) -> Path | None:
    """The folder that is named; None for what may be a Hub id, and an InputError for what is neither."""
    name = bundled(name_or_path, argument)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", ".", "-")):
        expected = "a folder with config.json and model.safetensors, or a Hub id such as Qwen/Qwen3-8B"
        received = f"{name!r} ({'a file' if folder.exists() else 'no such folder'})"
        raise InputError(argument, expected=expected, received=received, hint="check the path")
    return None


def fetch_folder(
    argument: str,
    name_or_path: str | os.PathLike[str],
    revision: str | None,
    patterns: Sequence[str],
    setting: str = "revision",
) -> Path:
    """The local folder of a checkpoint, downloaded (or found in the Hub cache) if it is a Hub id; ``lab`` is bundled.

    Args:
        argument: ``target`` or ``draft``.
        name_or_path: folder or Hub id.
        revision: of a Hub id: branch, tag or commit; None for its main branch. Folders have none.
        patterns: files wanted.
        setting: what the user knows the revision by.
    """
    name = bundled(name_or_path, argument)
    if (folder := local_folder(argument, name)) is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    expected = "a local folder or a Hub id that can be read"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        hint = "accept its terms on the Hub, then run `hf auth login`"
        raise InputError(argument, expected=expected, received=f"{name!r}, which is gated", hint=hint) from error
    except RevisionNotFoundError as error:
        raise InputError(setting, expected=f"one of {name}", received=revision, hint="check its name") from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; for a private one run `hf auth login`; for a folder give its path"
        raise InputError(argument, expected=expected, received=f"{name!r}, unknown to the Hub", hint=hint) from error
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        # no route, a proxy's refusal, offline mode without a cached copy: the Hub's client has many errors for it
        if (cached := _other_revisions(name, revision)) is not None:
            raise InputError(
                setting,
                expected=f"a revision of {name} in the Hub's cache ({shorten(cached)}), as the Hub gives no answer",
                received=revision or "none, which is main",
                hint="check its name, or check the network",
            ) from error
        received = f"{name!r}: no such folder, no cached copy, no answer from the Hub ({type(error).__name__})"
        hint = "check the network, or give the path of a downloaded copy"
        raise InputError(argument, expected=expected, received=received, hint=hint) from error


def _other_revisions(name: str, revision: str | None) -> list[str] | None:
    """Revisions of a Hub id in the cache: branches and tags, then commits; None where it has none or has this one."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    refs, snapshots = repository / "refs", repository / "snapshots"
    names = sorted(str(path.relative_to(refs)) for path in refs.rglob("*") if path.is_file())
    commits = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    wanted = revision or constants.DEFAULT_REVISION
    return [*names, *commits] if commits and wanted not in (*names, *commits) else None


def resolve_commit(
    argument: str, name_or_path: str | os.PathLike[str], revision: str | None, setting: str = "revision"
) -> str | None:
    """The commit that a Hub id's revision is now, or None for a folder; arguments as in :func:`fetch_folder`.

    Only one small file is fetched. A branch may move while a run loads its parts: whoever loads more than one part
    gives this commit to all of them.
    """
    if Path(bundled(name_or_path, argument)).expanduser().is_dir():
        return None
    # the Hub's client keeps each commit in a folder of its name
    return fetch_folder(argument, name_or_path, revision, ("config.json",), setting).name


def read_json(path: Path, argument: str) -> dict[str, Any]:
    """A checkpoint's JSON file; one that is missing or is no JSON object is refused."""
    name, again = path.name, "fetch it again"
    if not path.is_file():
        received = f"{path.parent}, which has none"
        raise InputError(argument, expected=f"a folder with {name}", received=received, hint="check the path")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(argument, expected=f"JSON in {name}", received=error, hint=again) from error
    if not isinstance(raw, dict):
        raise InputError(argument, expected=f"an object in {name}", received=type(raw).__name__, hint=again)
    return raw


def find_weights(folder: Path, argument: str) -> list[Path]:
    """The checkpoint's safetensors files: one, or those of its index, of which none may be missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        named = read_mapping(read_json(index, argument), "weight_map", f"{argument}.{index.name}")
        shards = sorted({folder / str(name) for name in named.values()})
        absent = [shard.name for shard in shards if shard.parent != folder or not shard.is_file()]
        if shards and not absent:
            return shards
        received = f"{index.name} naming {shorten(absent) or 'no files'}, absent"
        raise InputError(argument, expected="every file of the index", received=received, hint="fetch it again")
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    raise InputError(
        argument,
        expected="model.safetensors (or model.safetensors.index.json)",
        received=f"{folder}, which has {shorten(others) or 'no weights'}",
        hint="pickled weights are never loaded: convert to safetensors" if others else "check the path",
    )


def refuse_quantised(raw: Mapping[str, Any], argument: str) -> None:
    """Refuse a config.json that says that weights are quantised (GPTQ, AWQ, bitsandbytes, FP8, …), by its name."""
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) is not None:
            method = read_mapping(raw, key, argument).get("quant_method") or "an unnamed method"
            raise quantised(argument, f"weights quantised by {method} ({key} in config.json)")


def quantised(argument: str, received: str) -> InputError:
    """The error for weights that are no plain floating-point numbers."""
    hint = "quantised checkpoints are not supported: use the one that it was made from"
    expected = f"weights in {', '.join(FLOATS.values())}"
    return InputError(argument, expected=expected, received=received, hint=hint)


def refuse_narrow_weights(files: Sequence[Path], argument: str) -> None:
    """Refuse integer and 8-bit weights of safetensors files, which would be read as what they are not.

    Their headers alone are read; a file that can't be read is left to who loads it.
    """
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return
        for name, kind in kinds.items():
            if kind not in FLOATS and "weight" in name.rpartition(".")[2]:
                raise quantised(argument, f"{name} in {kind} ({file.name})")


def read_field(
    raw: Mapping[str, Any], key: str, argument: str, expected: str, fits: Callable[[Any], bool], default: Any = None
) -> Any:
    """The value of a key, the default where it is absent or null; one that does not fit is named with its key."""
    value = default if raw.get(key) is None else raw[key]
    if not fits(value):
        raise InputError(f"{argument}.{key}", expected=expected, received=repr(value), hint=HINT)
    return value


def is_integer(value: object) -> bool:
    """Whether a value is an integer; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; JSON's true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_mapping(raw: Mapping[str, Any], key: str, argument: str) -> dict[str, Any]:
    """An object, empty where the key is absent or null."""
    return dict(read_field(raw, key, argument, "an object", lambda value: isinstance(value, Mapping), {}))


def read_list(raw: Mapping[str, Any], key: str, argument: str) -> list[Any]:
    """A list, empty where the key is absent or null."""
    return list(read_field(raw, key, argument, "a list", lambda value: isinstance(value, list | tuple), ()))


def read_number(raw: Mapping[str, Any], key: str, argument: str, default: float | None = None) -> float:
    """A finite number above 0, the default where the key is absent."""
    default = None if key in raw else default
    return float(
        read_field(raw, key, argument, "a number above 0", lambda value: is_number(value) and value > 0, default)
    )


def read_rope(raw: Mapping[str, Any], argument: str) -> tuple[float, dict[str, Any]]:
    """The rope's theta, and its parameters with their ``rope_type``.

    From ``rope_parameters`` (5.x) or ``rope_theta`` and ``rope_scaling`` (4.x); nothing that its kind needs may be
    absent.
    """
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    params, where = read_mapping(raw, key, argument), f"{argument}.{key}"
    if params.get("rope_theta") is not None:
        theta = read_number(params, "rope_theta", where)
    else:
        theta = 10000.0 if raw.get("rope_theta") is None else read_number(raw, "rope_theta", argument)
    params.pop("rope_theta", None)
    old = params.pop("type", None)
    kind = params.get("rope_type") or old or "default"
    if not isinstance(kind, str):
        raise InputError(f"{where}.rope_type", expected="a name", received=repr(kind), hint=HINT)
    for name in _ROPE_NEEDS.get(kind, ()):
        read_number(params, name, where)
    for name in _ROPE_NUMBERS:
        read_field(params, name, where, "a number", is_number, 0)
    return theta, params | {"rope_type": kind}


def shorten(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_words(error: Exception) -> str:
    """The first line of a library's error (some have pages), or two where the first only names what is wrong."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
