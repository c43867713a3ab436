"""The one error a user's mistake raises: argument, what was expected, what came, and a hint, on one line."""

from __future__ import annotations

LEAVE_OUT = "leave it out (on a command line: null)"  # the way out where a setting may be absent


class InputError(ValueError):
    """Bad input, reported in one line: ``argument: expected …, received …. Hint: …``.

    Args:
        argument: the name the user knows it by (``target``, ``max_new_tokens``, ``data.path line 3``).
        expected: what would have been fine.
        received: what came, short.
        hint: what to do now.
    """

    def __init__(self, argument: str, *, expected: str, received: object, hint: str) -> None:
        self.argument, self.expected, self.received, self.hint = argument, expected, str(received), hint
        line = f"{argument}: expected {expected}, received {received}. Hint: {hint}"
        super().__init__(" ".join(line.split()))

    def named(self, argument: str) -> InputError:
        """The same mistake under another name."""
        return type(self)(argument, expected=self.expected, received=self.received, hint=self.hint)


class ContextError(InputError):
    """What is wrong with one context, where the next one may be fine: a run records it and goes on."""
