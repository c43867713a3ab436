"""Any text as something that can be shown: what can't be seen, or would reorder what is around it, gets a sign."""

from functools import cache
from pathlib import Path
from typing import Any

# Control characters have pictures of their own in Unicode; newlines and tabs stay.
_SIGNS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_SIGNS[0x7F] = "\u2421"
_LOST = (*range(0x80, 0xA0), *range(0xD800, 0xE000))  # later controls; half characters, which no file can hold
_TURNING = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SIGNS.update(dict.fromkeys(_LOST, "\ufffd"))
_SIGNS.update({code: f"⟨U+{code:04X}⟩" for code in _TURNING})


def visible(text: str) -> str:
    """The text with signs for control characters, for half characters and for marks that change its direction."""
    return text.translate(_SIGNS)


def rendered(template: str, **values: Any) -> str:
    """A template of ``templates/`` filled in: every value is made visible and escaped, a missing one is an error."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # for those who write pages

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
