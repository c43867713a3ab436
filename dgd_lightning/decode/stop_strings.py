"""Stop strings: the first token whose text completes one of them, and the text of an answer that ends there.

The text of tokens is what the tokenizer makes of all of them together, special tokens written out, so a string may
span tokens, begin or end inside one, or be a special token itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError

WINDOW = 32  # tokens: so many at least are read again when new ones come, whatever the strings
MARGIN = 16  # characters: more than a text may differ in where its first tokens are left out (a space, a cut character)


class StopStrings(NamedTuple):
    """Strings at which decoding ends, and the tokenizer that turns tokens into text."""

    tokenizer: Any
    strings: tuple[str, ...]

    def text(self, ids: Sequence[int]) -> str:
        """Of tokens [T], as it is searched."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def place(self, text: str) -> int | None:
        """Where in a text the first of the strings begins; None where it has none."""
        return min((at for string in self.strings if (at := text.find(string)) >= 0), default=None)

    def answer(self, ids: Sequence[int]) -> str:
        """The text of new tokens [T], without special tokens, before the first string."""
        place = self.place(text := self.text(ids))
        if place is None:
            return answer_text(self.tokenizer, ids)
        # Whole tokens before the string; what the token has before it in which it begins is added.
        before = text[:place]
        count = next(n for n in range(len(ids), -1, -1) if before.startswith(self.text(ids[:n])))
        return answer_text(self.tokenizer, ids[:count]) + before[len(self.text(ids[:count])) :]


def answer_text(tokenizer: Any, ids: Sequence[int], stop_strings: Sequence[str] | None = None) -> str:
    """The text of new tokens [T], special ones left out, cut before the first of the stop strings."""
    if stop_strings:
        return StopStrings(tokenizer, tuple(stop_strings)).answer(ids)
    return tokenizer.decode(ids, skip_special_tokens=True)


def check_stop_strings(tokenizer: Any, strings: Sequence[str] | None) -> StopStrings | None:
    """The strings with the tokenizer that they need; None where there are none."""
    if strings is None or (isinstance(strings, list | tuple) and not strings):
        return None
    fine = isinstance(strings, list | tuple) and all(isinstance(one, str) and one for one in strings)
    if not fine or any("\ufffd" in one for one in strings):  # it stands for characters that are not whole yet
        raise InputError(
            "stop_strings",
            expected="a list of texts of at least one character, none of them U+FFFD, or None",
            received=repr(strings),
            hint='use e.g. ["Question:"]',
        )
    if tokenizer is None:
        raise InputError(
            "stop_strings",
            expected="a pair with a tokenizer, by which tokens become text",
            received="none",
            hint="add the tokenizer's files to the target's folder, or use stop_token_ids",
        )
    return StopStrings(tokenizer, tuple(strings))


class GrowingText:
    """The tokens of one row, of which only those that a stop string can reach back to are turned into text again."""

    def __init__(self, stops: StopStrings) -> None:
        self.stops, self.ids, self.start = stops, list[int](), 0
        self.needed = max(map(len, stops.strings)) + MARGIN  # characters before the next token

    def append(self, new: Sequence[int]) -> int | None:
        """Take up new tokens [n]; how many of them stay where one completes a stop string, None where none does."""
        if not new:
            return None
        before = len(self.ids)
        self.ids += new
        if self.stops.place(self.stops.text(self.ids[self.start :])) is not None:
            for end in range(before + 1, len(self.ids) + 1):  # from the first token on: this decides, and is rare
                if self.stops.place(self.stops.text(self.ids[:end])) is not None:
                    return end - before
        recent = len(self.ids) - WINDOW
        if recent - self.start >= WINDOW and len(self.stops.text(self.ids[recent:])) >= self.needed:
            self.start = recent
        return None

    def go_back(self, count: int) -> None:
        """Take back all but the first tokens."""
        del self.ids[count:]
        self.start = 0

    def copy(self) -> "GrowingText":
        """Another one, which goes on by itself."""
        other = GrowingText(self.stops)
        other.ids, other.start = list(self.ids), self.start
        return other
