"""`LocalEndpoint`: a Hugging Face model in this process as judge; greedy, one prompt at a time."""

from __future__ import annotations

import threading
from typing import Any

from dgd_lightning.errors import InputError
from dgd_lightning.scoring.judge_config import JudgeModel
from dgd_lightning.scoring.one_judge import Effort, Endpoint, NoAnswer, Reply


class LocalEndpoint(Endpoint):
    """A causal LM that `load_target` takes (safetensors, no remote code); loaded when first asked.

    Args:
        settings: checked, with ``local``.
        argument: ``judge`` or ``judge.second``, for errors.

    Raises:
        InputError: no such folder or Hub id.
    """

    def __init__(self, settings: JudgeModel, argument: str) -> None:
        from dgd_lightning.pair import source_fingerprint  # torch: only for those whose judge is local
        from dgd_lightning.target.folder import resolve_commit

        self._settings, self._argument = settings, argument
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._loaded: tuple[Any, Any] | None = None
        try:
            self._commit = resolve_commit("target", settings.model, settings.revision)
        except InputError as error:
            raise self._as_ours(error) from error
        self._identity = {
            "model": settings.model,
            "weights": source_fingerprint("target", settings.model, self._commit),
            "local": True,
            "dtype": settings.dtype,
            "max_new_tokens": settings.max_new_tokens,
        }

    def identity(self) -> dict[str, Any]:
        return self._identity

    def ask(self, prompt: str, effort: Effort) -> Reply:
        """See `Endpoint.ask`. Greedy, so another request would give the same reply."""
        with self._lock:
            self._go_on()
            target, tokenizer = self._load()
            return self._generate(target, tokenizer, prompt, effort)

    def stop(self) -> None:
        self._ended.set()

    def close(self) -> None:
        with self._lock:
            self._loaded = None

    def _generate(self, target: Any, tokenizer: Any, prompt: str, effort: Effort) -> Reply:
        import torch

        text = prompt
        chat = getattr(tokenizer, "chat_template", None) is not None
        if chat:
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt", verbose=False)["input_ids"]
        room = target.max_positions - ids.shape[1]
        if room < 1:
            raise NoAnswer(f"a prompt of {ids.shape[1]} tokens, the judge reads {target.max_positions}")
        effort.requests += 1
        with torch.inference_mode():
            out = target.model.generate(
                ids.to(target.device),
                attention_mask=torch.ones_like(ids).to(target.device),
                do_sample=False,
                temperature=None,  # the generation config's, which greedy decoding would warn of
                top_p=None,
                top_k=None,
                max_new_tokens=min(self._settings.max_new_tokens, room),
                eos_token_id=list(target.stop_token_ids) or None,
                pad_token_id=0,
                stopping_criteria=[
                    lambda ids, _, **__: torch.full(ids.shape[:1], self._ended.is_set(), device=ids.device)
                ],
            )
        self._go_on()  # what was broken off is no reply
        new = out[0, ids.shape[1] :].tolist()  # [T]
        effort.count_tokens(ids.shape[1], len(new))
        ended = bool(new) and new[-1] in target.stop_token_ids
        return Reply(tokenizer.decode(new, skip_special_tokens=True), None if ended else "a reply that was cut off")

    def _go_on(self) -> None:
        if self._ended.is_set():
            raise RuntimeError("the judge was stopped while a row waited for its verdict")

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from dgd_lightning.pair import load_tokenizer
            from dgd_lightning.target.load import load_target

            settings = self._settings
            try:
                target = load_target(
                    settings.model, dtype=settings.dtype, device=settings.device, revision=self._commit
                )
                tokenizer = load_tokenizer(settings.model, revision=self._commit)
            except InputError as error:
                raise self._as_ours(error) from error
            if tokenizer is None:
                raise InputError(
                    f"{self._argument}.model",
                    expected="a folder or Hub id with a tokenizer",
                    received=f"{settings.model}, which has none",
                    hint="add the tokenizer's files",
                )
            self._loaded = target, tokenizer
        return self._loaded

    def _as_ours(self, error: InputError) -> InputError:
        """A loader's complaint under the name that the judge's settings have for it."""
        return error.named(f"{self._argument}.{'model' if error.argument == 'target' else error.argument}")
