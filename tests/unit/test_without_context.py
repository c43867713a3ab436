"""A task without its context: what stays of lab rows, of dialogues, of lone questions and of raw prompts."""

from __future__ import annotations

import pytest

from dgd_lightning.data.without_context import without_context
from dgd_lightning.errors import InputError
from dgd_lightning.lab.rows import eval_rows
from dgd_lightning.types import Task

SYSTEM, BOOK = "You keep the ledger.", "One owes Two six sacks.\nTwo owes Three one sack."


def chat(idx: str, *turns: str, system: str | None = SYSTEM) -> Task:
    """Turns of user and assistant alternate."""
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return Task(idx, [*head, *({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))], None, {})


def left(task: Task, *others: Task) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in without_context(task, others).messages or ()]


def test_lab_rows_keep_their_question_alone() -> None:
    contexts: dict[str, list[Task]] = {}
    for row in eval_rows(1):
        task = Task(row["metadata"]["task_id"], row["messages"], None, row)
        contexts.setdefault(row["metadata"]["context_id"], []).append(task)
    assert len(contexts) > 5
    for tasks in contexts.values():
        for task in tasks:
            assert task.messages is not None
            question = task.messages[-1]["content"].rpartition("\n\n")[2]
            assert left(task, *(other for other in tasks if other is not task)) == [("user", question)]


def test_the_start_of_a_question_that_others_share_stays_with_it() -> None:
    one, two = chat("a", f"{BOOK}\nWhat does One owe?"), chat("b", f"{BOOK}\nWhat does Two owe?")
    assert left(one, two) == [("user", "What does One owe?")]
    line = "One owes Two six sacks. "
    one, two = chat("a", f"{line}What does One owe?"), chat("b", f"{line}What does Two owe?")
    assert left(two, one) == [("user", "What does Two owe?")]


def test_of_a_dialogue_the_last_message_stays() -> None:
    first = chat("a", f"{BOOK}\n\nTell me\nof One.")
    second = chat("b", f"{BOOK}\n\nTell me\nof One.", "Six sacks.", "And\n\nTwo?")
    assert left(second, first) == [("user", "And\n\nTwo?")]
    assert left(first, second) == [("user", "Tell me\nof One.")]  # word for word the others' first message
    assert left(first) == [("user", "Tell me\nof One.")]


def test_a_system_message_of_its_own_stays() -> None:
    one, two = chat("a", f"{BOOK}\nOne?"), chat("b", f"{BOOK}\nTwo?", system="Answer in rhymes.")
    assert left(one, two) == [("system", SYSTEM), ("user", "One?")]
    assert left(one, chat("c", f"{BOOK}\nThree?")) == [("user", "One?")]


def test_where_the_system_message_is_all_the_context() -> None:
    assert left(chat("a", "What does One owe?", system=BOOK)) == [("user", "What does One owe?")]


def test_raw_prompts_lose_what_they_share() -> None:
    one, two = (Task(idx, None, f"{BOOK}\n{idx} owes", {}) for idx in ("One", "Two"))
    assert without_context(one, [two]).prompt == "One owes"


@pytest.mark.parametrize(
    ("task", "others", "received"),
    [
        (chat("x", "What is six times six?", system=None), [], "a question alone"),
        (Task("x", None, "Six times six is", {}), [], "a question alone"),
        (chat("x", BOOK), [chat("b", f"{BOOK}\nTwo?")], "nothing but the context"),
        (Task("x", [{"role": "system", "content": BOOK}], None, {}), [], "nothing but the context"),
    ],
)
def test_no_context_or_no_question_is_told(task: Task, others: list[Task], received: str) -> None:
    with pytest.raises(InputError, match="^task x: expected .*received " + received):
        without_context(task, others)
