"""The program in a model's answer. It runs inside the sandbox: parsing hostile text can bring an interpreter down."""

import ast
import re
import textwrap
from typing import NamedTuple

FENCED = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)",
    re.M | re.S,
)
PYTHON = {"", "python", "python3", "py"}
KEPT = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


class Program(NamedTuple):
    """Sources that run one after the other in one namespace, and how they were found."""

    sources: list[str]
    found: str  # "fenced block", "fenced continuation", "code in text", "continuation" or "nothing"


def find_program(answer: str, prompt: str, names: list[str]) -> Program:
    """The program that an answer means, looked for in this order, behind the last ``</think>``:

    1. the last fenced Python block that defines all names (else some of them); a fence that is never closed reaches
       to the end. What precedes the prompt's function (imports, helpers) runs before it.
    2. the last fenced block as the continuation of the prompt;
    3. without fences, the answer as the continuation of the prompt, where its first line is indented or its text
       defines no name: up to the first top-level statement that is neither a definition, an import nor an assignment;
    4. the text from its first line of code to the last that parses.

    Args:
        answer: what the model wrote.
        prompt: the first part of the program (HumanEval), or "" where the prompt is no code (MBPP).
        names: what the program must define.
    """
    answer = answer.rsplit("</think>", 1)[-1].replace("\r\n", "\n")
    starts = [start.start() for name in names if (start := re.search(rf"^def\s+{re.escape(name)}\b", prompt, re.M))]
    preamble = [prompt[: min(starts)]] if starts else []  # what precedes the function that the prompt begins
    blocks = [block["code"] for block in FENCED.finditer(answer) if block["language"].lower() in PYTHON]
    for wanted in (all, any):
        for code in reversed(blocks):
            if wanted(_defines(textwrap.dedent(code), name) for name in names):
                return Program([*preamble, textwrap.dedent(code)], "fenced block")
    if blocks and prompt:
        return Program([_continued(prompt, blocks[-1], names)], "fenced continuation")
    if blocks:
        return Program([textwrap.dedent(blocks[-1])], "fenced block")
    indented = answer.lstrip("\n")[:1].isspace()
    defined = any(_defines(answer, name) for name in names)
    if prompt and (indented or not defined):
        return Program([_continued(prompt, answer, names)], "continuation")
    if defined:
        start = re.search(r"^(?:from |import |@|def |async def |class |[A-Za-z_]\w* *=[^=])", answer, re.M)
        return Program([*preamble, _parsing(answer[start.start() if start else 0 :], 0)], "code in text")
    return Program([], "nothing")


def _defines(code: str, name: str) -> bool:
    name = re.escape(name)
    return re.search(rf"^(?:(?:async\s+)?def|class)\s+{name}\b|^{name}\s*=", code, re.M) is not None


def _parsing(source: str, keep: int) -> str:
    """The longest prefix that parses, found by cutting at each error; the first ``keep`` lines always stay."""
    lines = source.split("\n")
    while len(lines) > keep:
        try:
            ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            lines = lines[: min((error.lineno or len(lines)) - 1, len(lines) - 1)]
    return "\n".join(lines)


def _continued(prompt: str, code: str, names: list[str]) -> str:
    """The prompt and its continuation, whose first line may have lost its indentation, or all of them."""
    head = prompt if prompt.endswith("\n") else prompt + "\n"
    keep = head.count("\n")
    indented = textwrap.indent(textwrap.dedent(code), "    ")
    variants = [_parsing(head + text, keep) for text in (code, "    " + code.lstrip(), indented)]
    variants += [_parsing(prompt + code, prompt.count("\n"))] if not prompt.endswith("\n") else []
    best = max(variants, key=len)  # of equal ones the first: unchanged
    try:
        tree = ast.parse(best)
    except SyntaxError:
        return best
    seen = False
    for statement in tree.body:
        again = getattr(statement, "name", None) in names
        if seen and (again or not isinstance(statement, KEPT)):
            return "\n".join(best.split("\n")[: statement.lineno - 1])
        seen = seen or again
    return best
