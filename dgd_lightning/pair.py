"""A target and its draft, checked against each other."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dgd_lightning.draft.checkpoint import Adapter, load_draft
from dgd_lightning.draft.config import DraftConfig
from dgd_lightning.draft.lora import with_adapter
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError
from dgd_lightning.target.folder import (
    TOKENIZER_FILES,
    bundled,
    fetch_folder,
    first_words,
    read_json,
    refuse_quantised,
    resolve_commit,
)
from dgd_lightning.target.load import check_family, load_target
from dgd_lightning.target.model import Target

MARK = "dgd-mark"  # in place of a user's words, where a template is asked what stands around them
HASHED_WHOLE = 64 * 2**20  # bytes; of larger weight files only size and time of change count


@dataclass
class Pair:
    """What every decoder takes."""

    target: Target
    draft: DFlashDraft | None  # None: a target alone, for autoregressive decoding
    tokenizer: Any | None  # a transformers tokenizer, or None where the target's folder has none

    @contextmanager
    def adapter(self, adapted: Any) -> Iterator[DFlashDraft]:
        """Decode with a draft that was adapted to a context: ``with pair.adapter(result): …``; off again at the end.

        Args:
            adapted: what ``ttt_adapt`` or ``load_adapter`` gave.

        Raises:
            InputError: there is no draft, it has an adapter already, or the adapter was made for another one.
        """
        draft, adapter = self.require_draft(), getattr(adapted, "adapter", adapted)
        if not isinstance(adapter, Adapter):
            expected, hint = "what ttt_adapt or load_adapter gave", "load a folder with load_adapter first"
            raise InputError("adapted", expected=expected, received=repr(adapted)[:80], hint=hint)
        lora = with_adapter(draft, adapter)
        try:
            yield draft
        finally:
            lora.remove()

    def require_draft(self, hint: str = "give load_pair a draft") -> DFlashDraft:
        """The draft, which a pair must have here."""
        if self.draft is None:
            raise InputError("pair", expected="a pair with a draft", received="a target alone", hint=hint)
        return self.draft


class Commits(NamedTuple):
    """The commits of a pair's revisions; None for folders, and for a draft that is not there."""

    target: str | None
    draft: str | None


def resolve_commits(
    target: str | os.PathLike[str],
    draft: str | os.PathLike[str] | None,
    revision: str | None,
    draft_revision: str | None,
    *,
    prefix: str = "",
) -> Commits:
    """The commits of a pair's revisions, so that all its parts are read from the same ones.

    ``prefix`` stands before ``revision`` and ``draft_revision`` in errors.
    """
    ours = resolve_commit("target", target, revision, f"{prefix}revision")
    theirs = draft if draft is None else resolve_commit("draft", draft, draft_revision, f"{prefix}draft_revision")
    return Commits(ours, theirs)


def load_pair(
    target: str | os.PathLike[str],
    draft: str | os.PathLike[str] | None,
    *,
    dtype: str | torch.dtype = "auto",
    draft_dtype: str | torch.dtype | None = None,
    device: str | torch.device | Mapping[str, Any] = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    draft_revision: str | None = None,
) -> Pair:
    """Load a frozen target, its draft and the target's tokenizer; the draft follows the target's dtype and device.

    Args:
        target: folder or Hub id of a causal LM (Qwen3, Qwen3-MoE, Llama, Qwen2), or ``lab`` for the bundled one.
        draft: folder or Hub id of a DFlash draft, ``lab``, or None for the target alone.
        dtype: ``auto`` (the target checkpoint's where the device computes it natively, else float32), a torch dtype or
            its name.
        draft_dtype: of the draft; None for the target's. Decoding needs the same, training wants fp32.
        device: ``auto``, a device, or a ``device_map``.
        attn_implementation: of the target, ``sdpa`` (default) or ``eager``.
        revision: Hub revision of the target, its tokenizer included: branch, tag or commit.
        draft_revision: Hub revision of the draft.

    Raises:
        InputError: either cannot be loaded, or they do not belong together.
    """
    commits = resolve_commits(target, draft, revision, draft_revision)
    loaded = load_target(
        target, dtype=dtype, device=device, attn_implementation=attn_implementation, revision=commits.target
    )
    network, tokenizer = None, load_tokenizer(target, revision=commits.target)
    warn_of_ends(loaded, tokenizer)
    if draft is not None:
        head = loaded.model.get_output_embeddings()
        shared = {"embed_tokens.weight": loaded.embedding.weight, "lm_head.weight": head.weight}
        kind = draft_dtype or loaded.dtype
        network = load_draft(draft, dtype=kind, device=loaded.device, revision=commits.draft, shared=shared)
        check_pair(loaded, network.config, tokenizer)
    return Pair(loaded, network, tokenizer)


def outline_pair(
    target: str | os.PathLike[str],
    draft: str | os.PathLike[str] | None,
    revision: str | None = None,
    draft_revision: str | None = None,
) -> Pair:
    """A pair of the right shapes without its weights, on the meta device: what can be checked before they are loaded.

    Raises:
        InputError: as in :func:`load_pair`, but for what is wrong with weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = fetch_folder("target", target, revision, ("config.json", *TOKENIZER_FILES))
    raw = read_json(folder / "config.json", "target")
    refuse_quantised(raw, "target")
    check_family(raw)
    network, tokenizer = None, load_tokenizer(target, revision=revision)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        outline = Target(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))
        if draft is not None:
            theirs = fetch_folder("draft", draft, draft_revision, ("config.json",))
            network = DFlashDraft(DraftConfig.from_dict(read_json(theirs / "config.json", "draft"))).to(outline.dtype)
            check_pair(outline, network.config, tokenizer)
    return Pair(outline, network, tokenizer)


def check_pair(target: Target, draft: DraftConfig, tokenizer: Any | None = None) -> None:
    """Check that a draft was made for a target of this shape.

    Its ``vocab_size`` says only for which vocabulary it was trained, since it has the target's embedding and head:
    where both have every token of the tokenizer, they differ by unused rows alone.
    """
    hint = "use a draft trained for this target"
    tokens = token_count(tokenizer)
    padded = tokens is not None and draft.vocab_size >= tokens and target.vocab_size >= tokens
    for name, ours, theirs in (
        ("hidden_size", draft.hidden_size, target.hidden_size),
        ("vocab_size", target.vocab_size if padded else draft.vocab_size, target.vocab_size),
        ("num_target_layers", draft.num_target_layers, target.num_layers),
    ):
        if ours != theirs:
            raise InputError(f"draft.{name}", expected=f"{theirs}, the target's", received=ours, hint=hint)
    rows = target.embedding.num_embeddings
    if not 0 <= draft.mask_token_id < rows:
        expected = f"a row of the target's embedding, 0…{rows - 1}"
        raise InputError("draft.mask_token_id", expected=expected, received=draft.mask_token_id, hint=hint)


def token_count(tokenizer: Any | None) -> int | None:
    """One more than the largest id that a tokenizer can give; None where there is no tokenizer."""
    return None if tokenizer is None else 1 + max(tokenizer.get_vocab().values(), default=-1)


def warn_of_ends(target: Target, tokenizer: Any | None) -> None:
    """Warn where the generation config lacks the tokenizer's end token: answers would go on behind it."""
    end, ends = getattr(tokenizer, "eos_token_id", None), target.stop_token_ids
    if ends and end is not None and end not in ends:
        warnings.warn(
            f"the tokenizer's end token {tokenizer.eos_token} ({end}) does not end answers: the target's generation "  # type: ignore[union-attr]
            f"config has {', '.join(map(str, ends))} alone; if it should, set stop_token_ids to [{end}, …]",
            stacklevel=3,
        )


def load_tokenizer(target: str | os.PathLike[str], *, revision: str | None = None) -> Any | None:
    """The tokenizer of a target's folder or Hub id, read without remote code, or None where it has none."""
    folder = fetch_folder("target", target, revision, ("config.json", *TOKENIZER_FILES))
    if not any(Path(folder, name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a tokenizer.json of another shape raises whatever its reader met first, even Exception
        expected = "a readable tokenizer (tokenizer.json, tokenizer_config.json)"
        received = f"{folder.name}: {type(error).__name__} {first_words(error)}"
        raise InputError("target", expected=expected, received=received, hint="fetch it again") from error


def user_turn(tokenizer: Any | None, *, enable_thinking: bool = False) -> tuple[str, str] | None:
    """What a chat template writes before a user's words and behind them, up to the answer.

    None where there is no template, or one that does not write the words as they are.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    chat = [{"role": "user", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(  # type: ignore[union-attr]
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    except Exception:  # templates raise what they like, e.g. at a chat without a system message
        return None
    before, found, behind = text.rpartition(MARK)
    return (before, behind) if found else None


def source_fingerprint(argument: str, source: str, commit: str | None) -> str:
    """A Hub id with its commit, ``id@commit``; a folder's digest of weights and configuration, for ``commit`` None."""
    if commit is not None:
        return f"{source}@{commit}"
    digest = hashlib.sha256()
    for path in sorted(Path(bundled(source, argument)).expanduser().iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model"):
            stat = path.stat()
            content = path.read_bytes() if stat.st_size <= HASHED_WHOLE else str(stat.st_mtime_ns).encode()
            digest.update(f"{path.name} {stat.st_size} ".encode() + content)
    return digest.hexdigest()
