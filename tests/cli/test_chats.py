"""Chats of rows: what messages say beside role and content reaches the chat template, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import byte_tokenizer, chat_row

from dgd_lightning.data.chat import prompt_text
from dgd_lightning.data.contexts import ContextsData
from dgd_lightning.data.prompts import PromptsData
from dgd_lightning.data.responses import ResponsesData
from dgd_lightning.data.without_context import without_context
from dgd_lightning.errors import InputError
from dgd_lightning.pair import load_tokenizer
from dgd_lightning.row_files import Row
from dgd_lightning.types import Task

FULL = (  # a template that knows everything, and leaves out reasoning but for that of the last message
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls %}<call>{{ call | tojson }}</call>{% endfor %}{% endfor %}<assistant>"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "2 + 2?", "name": "Ann"},
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "c1", "name": None},
    {"role": "user", "content": [{"type": "text", "text": "So"}, {"type": "text", "text": "what?"}]},
]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def task_of(messages: Any, **more: Any) -> Task:
    (task,) = PromptsData("x.jsonl", field="messages").parse([Row("line 1", 1, {"messages": messages, **more})])
    return task


def text_of(template: Any, messages: Any, **more: Any) -> str:
    return prompt_text(byte_tokenizer(template), task_of(messages, **more), enable_thinking=False)


def test_all_that_messages_say_reaches_the_template() -> None:
    assert text_of(FULL, CHAT, tools=TOOLS) == (
        f"<tools>{json.dumps(TOOLS)}</tools><system>Use tools.<user Ann>2 + 2?"
        f"<assistant><call>{json.dumps(CALL)}</call><tool>4<user>So\nwhat?<assistant>"
    )


NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
NO_TOOL = PLAIN.replace("in messages", "in messages if m.role != 'tool'")
DEFAULT = "{% if messages[0].role != 'system' %}<system>Help.{% endif %}" + PLAIN  # as Qwen2.5's


@pytest.mark.parametrize(
    ("template", "message", "more", "left_out"),
    [
        (PLAIN, {"name": "Ann"}, {}, "name"),
        (PLAIN, {"timestamp": 12}, {}, "timestamp"),
        (PLAIN, {"role": "assistant", "tool_calls": [CALL]}, {}, "tool_calls"),
        (PLAIN, {"role": "assistant", "reasoning_content": "hm"}, {}, "reasoning_content"),
        (PLAIN, {}, {"tools": TOOLS}, "tools"),
        (NO_TOOL, {"role": "tool"}, {}, "messages of the role 'tool'"),
        (NO_SYSTEM, {"role": "system"}, {}, "messages of the role 'system'"),
        (FULL, {"role": "assistant", "reasoning_content": "hm"}, {}, None),  # of an earlier turn: by design
        (PLAIN, {"name": None, "tool_call_id": "c1"}, {"tools": []}, None),
        (DEFAULT, {"role": "system", "content": "Help."}, {}, None),
    ],
)
def test_what_the_template_leaves_out_is_refused(
    template: str, message: dict[str, Any], more: dict[str, Any], left_out: str | None
) -> None:
    messages = [{"role": "user", "content": "x", **message}, {"role": "user", "content": "y"}]
    if left_out is None:
        assert text_of(template, messages, **more)
        return
    with pytest.raises(InputError, match=f"^task x-1: .* received {left_out}, which it leaves out"):
        text_of(template, messages, **more)


def test_tools_that_are_text_are_refused_in_chats_and_are_a_field_elsewhere() -> None:
    with pytest.raises(InputError, match="'tools' to be a list of objects, received str"):
        text_of(FULL, CHAT, tools=json.dumps(TOOLS))
    asked = PromptsData("x.jsonl", field="q", template="{prompt} with {tools}")
    (task,) = asked.parse([Row("line 1", 1, {"q": "2 + 2?", "tools": "add"})])
    assert prompt_text(byte_tokenizer(FULL), task, enable_thinking=False) == "<user>2 + 2? with add<assistant>"


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], {}, "ends with the assistant's"),
        ([{"role": "owner", "content": "x"}], {}, "messages with 'role' .system, user, assistant, tool."),
        ([{"role": "user", "content": None}], {}, "messages with 'role'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "parts of text"),
        ([{"role": "user", "content": "x"}, "y"], {}, "received y"),
        ([{"role": "user", "content": "x"}], {"template": "Now: {prompt}"}, "received a list of messages"),
        ([{"role": "user", "content": "x"}], {"chat": False}, "received a list of messages"),
        ([CHAT[0], {"role": "user", "content": "x"}], {"system": "Be brief."}, "received a list of messages"),
        ([], {}, "an empty text"),
    ],
)
def test_prompts_that_are_no_chat_to_answer(prompt: list[Any], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^line 1: .*{words}"):
        PromptsData("x.jsonl", **settings).parse([Row("line 1", 1, {"prompt": prompt})])


def test_a_prompt_may_be_a_chat_of_either_form() -> None:
    data = PromptsData("x.jsonl", system="Be brief.")
    (first,) = data.parse([Row("line 1", 1, {"prompt": [{"role": "user", "content": "x"}]})])
    (second,) = data.parse([Row("line 1", 1, {"prompt": [{"from": "human", "value": "x"}]})])
    assert first.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert second.messages == first.messages


def test_contexts_keep_the_fields_of_their_messages(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(chat_row(0, 0, messages=CHAT, tools=TOOLS)) + "\n")
    (task,) = ContextsData(str(tmp_path / "x.jsonl")).tasks
    assert task.messages == task_of(CHAT).messages
    assert task.row["messages"] == CHAT
    bare = without_context(task, [])
    assert bare.messages == [{"role": "user", "content": "So\nwhat?"}]


def test_a_target_without_a_template_is_told_which_setting_there_is() -> None:
    with pytest.raises(InputError, match=r"^target: .* received none, .* with PromptsData and data\.chat: false$"):
        text_of(None, CHAT)


def test_named_templates(tmp_path: Path) -> None:
    """What the hint says works: the template that is wanted becomes the default."""
    chat = [{"role": "user", "content": "x"}]
    tokenizer = byte_tokenizer({"short": PLAIN, "tool_use": FULL})  # type: ignore[arg-type]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"^target: .* received several \(short, tool_use\), .* as chat_template\.jinja in"
    ):
        prompt_text(load_tokenizer(tmp_path), task_of(chat), enable_thinking=False)
    with_tools = prompt_text(load_tokenizer(tmp_path), task_of(chat, tools=TOOLS), enable_thinking=False)
    assert with_tools.startswith("<tools>")  # transformers' own rule
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert prompt_text(load_tokenizer(tmp_path), task_of(chat), enable_thinking=False) == "<user>x<assistant>"


ASKED, ANSWER = [{"role": "user", "content": "Hm?"}], {"role": "assistant", "content": "Yes."}
ANSWERED: list[dict[str, Any]] = [
    {"messages": ASKED, "model_output": "Yes."},
    {"messages": [*ASKED, ANSWER]},
    {"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]},
    {"conversations": [*ASKED, ANSWER], "messages": None},
]


def encoded(row: dict[str, Any]) -> tuple[str, str]:
    """Prompt and answer of a row, for a fit of the draft."""
    tokenizer = byte_tokenizer(PLAIN)
    prompt, answer = ResponsesData("x", "y").encode(tokenizer, Row("line 1", 1, row), "1")
    return tokenizer.decode(prompt), tokenizer.decode(answer)


@pytest.mark.parametrize("row", ANSWERED)
def test_a_fit_reads_answers_of_all_forms(row: dict[str, Any]) -> None:
    assert encoded(row) == ("<user>Hm?<assistant>", "Yes.<e>")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"question": "Hm?", "answer": "Yes."},
            "an answer: a chat in 'messages', or in ShareGPT's 'conversations', .*",
        ),
        ({"model_output": "Yes."}, "a chat in 'messages'.* received fields model_output"),
        ({"messages": ASKED}, "'model_output', or a chat in 'messages' that ends with the assistant's answer"),
        ({"messages": [ANSWER]}, "'model_output', or a chat"),
        ({"messages": [*ASKED, ANSWER], "model_output": "No."}, "a chat in 'messages' that is to be answered"),
        (
            {"messages": [*ASKED, {**ANSWER, "reasoning_content": "hm"}]},
            ".* the last with role, content, reasoning_content",
        ),
        ({"messages": ASKED, "model_output": 7}, "'model_output' to be a text, received int '7'"),
        ({"messages": "Hm?", "model_output": "x"}, "'messages' to be a list of messages, received str"),
        ({"conversations": [{"from": "bird", "value": "x"}]}, "messages with 'role'"),
    ],
)
def test_a_fit_says_what_its_rows_lack(row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^line 1: expected {words}"):
        encoded(row)
