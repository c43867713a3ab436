"""Chats as rows hold them, in OpenAI's form (``role``, ``content``) or ShareGPT's (``from``, ``value``)."""

from typing import Any

from dgd_lightning.data.rows import field
from dgd_lightning.errors import InputError
from dgd_lightning.row_files import Row

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "gpt": "assistant"}  # of ShareGPT
Message = dict[str, Any]  # role, content (a text), and what else the row says


def read_messages(row: Row, path: str) -> list[Message]:
    """The messages of a chat at a dotted path of a row.

    Parts of a ``content`` become one text, a line each; ``null`` stands for what is not there; an assistant's message
    with ``tool_calls`` needs no content. All other fields stay as they are: the chat template reads them, or they are
    refused when it is rendered.

    Raises:
        InputError: it is no such chat.
    """
    turns = field(row, path, list, "a list of messages")
    if not turns:
        hint = f"correct the field {path!r}"
        raise InputError(row.place, expected="at least one message", received="none", hint=hint)
    return [_message(row, path, turn) for turn in turns]


def read_question(row: Row, path: str) -> list[Message]:
    """The same of a chat that is to be answered: one that ends with the answer would put it into the prompt."""
    messages = read_messages(row, path)
    if messages[-1]["role"] == "assistant":
        raise InputError(
            row.place,
            expected=f"a chat in {path!r} that is to be answered, so that ends with the user's message",
            received="one that ends with the assistant's",
            hint="take the last message out, for example into a field 'answer'",
        )
    return messages


def _message(row: Row, path: str, turn: Any) -> Message:
    found = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    if "role" not in found and "from" in found:
        speaker = str(found.pop("from"))
        found = {"role": SPEAKERS.get(speaker, speaker), "content": found.pop("value", None), **found}
    content = found.get("content", "" if found.get("tool_calls") else None)
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        content = "\n".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str) or found.get("role") not in ROLES:
        raise InputError(
            row.place,
            expected=f"messages with 'role' ({', '.join(ROLES)}) and a 'content' of text or parts of text",
            received=str(turn)[:80],
            hint=f"correct the field {path!r}",
        )
    return {**found, "content": content}
