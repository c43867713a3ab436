"""The one error a user's mistake raises: argument, what was expected, what came, and the mend, on one line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one line: ``argument: expected …, received …. Mend: …``.

    Args:
        argument: the name the user knows it by (``target``, ``max_new_tokens``, ``data.path line 3``).
        expected: what would have been fine.
        received: what came, short.
        mend: what to do now.
    """

    def __init__(self, argument: str, *, expected: str, received: object, mend: str) -> None:
        self.argument, self.expected, self.received, self.mend = argument, expected, str(received), mend
        line = f"{argument}: expected {expected}, received {received}. Mend: {mend}"
        super().__init__(" ".join(line.split()))

    def named(self, argument: str) -> InputError:
        """The same mistake under another name."""
        return InputError(argument, expected=self.expected, received=self.received, mend=self.mend)
