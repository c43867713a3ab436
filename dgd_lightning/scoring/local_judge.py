"""`LocalEndpoint`: a Hugging Face model in this process as judge; greedy, one prompt at a time."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.errors import InputError
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.pair import Pair, load_pair, source_fingerprint
from dgd_lightning.scoring.judge_config import JudgeModel
from dgd_lightning.scoring.one_judge import Effort, Endpoint, NoAnswer, Reply
from dgd_lightning.target.folder import resolve_commit
from dgd_lightning.types import Task


class LocalEndpoint(Endpoint):
    """A causal LM that `load_target` takes (safetensors, no remote code); loaded when first asked."""

    def __init__(self, settings: JudgeModel, argument: str) -> None:
        self._settings, self._argument = settings, argument
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pair: Pair | None = None
        with self._mistakes():
            self._commit = resolve_commit("target", settings.model, settings.revision)
        self.identity = {
            "model": settings.model,
            "weights": source_fingerprint("target", settings.model, self._commit),
            "local": True,
            "dtype": settings.dtype,
            "max_new_tokens": settings.max_new_tokens,
        }

    def ask(self, prompt: str, effort: Effort) -> Reply:
        """See `Endpoint.ask`. Greedy, so another request would give the same reply."""
        with self._lock, self._mistakes():
            self._go_on()
            return self._generate(self._load(), prompt, effort)

    def stop(self) -> None:
        self._ended.set()

    def close(self) -> None:
        with self._lock:
            self._pair = None

    def _generate(self, pair: Pair, prompt: str, effort: Effort) -> Reply:
        tokenizer: Any = pair.tokenizer
        chat = getattr(tokenizer, "chat_template", None) is not None
        turn = [{"role": "user", "content": prompt}]
        task = Task("of the judge", turn if chat else None, None if chat else prompt, {})
        ids = prompt_ids(tokenizer, task, enable_thinking=False)  # [S]
        room = pair.target.max_positions - len(ids)
        if room < 1:
            raise NoAnswer(f"a prompt of {len(ids)} tokens, the judge reads {pair.target.max_positions}")
        effort.requests += 1
        limit = min(self._settings.max_new_tokens, room)
        (out,) = autoregressive_generate(pair, [ids], max_new_tokens=limit, on_progress=lambda _: self._go_on())
        effort.count_tokens(len(ids), len(out.tokens))
        text = tokenizer.decode(out.tokens.tolist(), skip_special_tokens=True)
        return Reply(text, None if out.stop_reason == "stop" else "a reply that was cut off")

    def _go_on(self) -> None:
        if self._ended.is_set():
            raise RuntimeError("the judge was stopped while a row waited for its verdict")

    def _load(self) -> Pair:
        found = self._settings
        options: dict[str, Any] = {"dtype": found.dtype, "device": found.device, "revision": self._commit}
        self._pair = self._pair or load_pair(found.model, None, **options)
        return self._pair

    @contextlib.contextmanager
    def _mistakes(self) -> Iterator[None]:
        """Loaders' complaints under the names that the judge's settings have."""
        try:
            yield
        except InputError as error:
            name = "model" if error.argument == "target" else error.argument
            raise error.named(f"{self._argument}.{name}") from error
