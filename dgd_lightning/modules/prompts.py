"""The prompts of a run's tasks: whole, without their contexts, and whether they fit the target."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dgd_lightning.data.chat import prompt_ids, prompt_text
from dgd_lightning.data.tasks import context_of
from dgd_lightning.data.without_context import without_context
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.types import Task


class Prompts:
    """Token ids of tasks.

    Args:
        pair: has a tokenizer.
        contexts: all tasks by context; empty where nothing is asked of contexts.
        max_new_tokens: must fit behind every prompt.
        enable_thinking: passed to the chat template.
    """

    def __init__(
        self, pair: Pair, contexts: Mapping[str, list[Task]], *, max_new_tokens: int, enable_thinking: bool
    ) -> None:
        self.pair, self.contexts = pair, contexts
        self.max_new_tokens, self.enable_thinking = max_new_tokens, enable_thinking

    @property
    def limit(self) -> int:
        """Longest prompt, in tokens.

        Raises:
            InputError: there is no room for one.
        """
        limit = self.pair.target.max_positions - self.max_new_tokens
        if limit < 1:
            raise InputError(
                "model.max_new_tokens",
                expected=f"less than the target's {limit + self.max_new_tokens} positions",
                received=self.max_new_tokens,
                hint="lower it",
            )
        return limit

    def of(self, task: Task) -> Tensor:
        """[S]"""
        return prompt_ids(self.pair.tokenizer, task, enable_thinking=self.enable_thinking)

    def of_context(self, context: str) -> list[Tensor]:
        """Prompts of all tasks of a context that fit: a prompt cut on the left begins with something else."""
        prompts = [self.of(task) for task in self.contexts[context]]
        return [prompt for prompt in prompts if len(prompt) <= self.limit] or [prompts[0][:0]]

    def without_context(self, task: Task) -> Task:
        """Raises:
        InputError: there is no context, or nothing else.
        """
        return without_context(task, [other for other in self.contexts[context_of(task)] if other.idx != task.idx])

    def bare(self, task: Task) -> Tensor:
        """[S'], the prompt without the context; cut on the left where it does not fit."""
        return self.of(self.without_context(task))[-self.limit :]

    def check_fit(self, task: Task) -> None:
        """Raises InputError for a prompt that does not fit. A token is at least a byte, so few texts need encoding."""
        text = prompt_text(self.pair.tokenizer, task, enable_thinking=self.enable_thinking)
        if len(text.encode()) < self.limit:
            return
        if (length := len(self.of(task))) > self.limit:
            raise InputError(
                f"task {task.idx}",
                expected=f"at most {self.limit} prompt tokens ({self.max_new_tokens} new ones must fit too)",
                received=length,
                hint="set model.too_long to skip or truncate_left, or use a target with a longer context",
            )
