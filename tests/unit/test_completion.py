"""Which program an answer means: answers of every form that models give, each with the verdict that it deserves.

Every program that is found runs here, with its tests, in a namespace of its own: the verdict is Python's.
"""

from __future__ import annotations

import gzip
import json
import re
import textwrap
import time
import types
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.scoring.code_grader import task_of
from dgd_lightning.scoring.jail.completion import find_program

PROMPT = '''from typing import List
import math


def twice(x: int) -> int:
    return 2 * x


def total(values: List[int]) -> int:
    """Twice the sum.
    >>> total([1, 2])
    6
    """
'''
BODY = "    result = 0\n    for value in values:\n        result += twice(value)\n    return result\n"
FULL = f"{PROMPT}{BODY}"
ONE = "def f(x):\n    return x\n"
OTHER = "def f(x):\n    return -1\n"
PY = "```python\n"
END = "```\n"


def passes(answer: str, prompt: str = "", test: str = "assert [f(x) for x in (0, 7)] == [0, 7]") -> bool:
    """Run the answer's program, then the test, as a plain interpreter would."""
    names = re.findall(r"\b(?:total|f|Pair)\b(?=\()", test)
    space = types.ModuleType("program").__dict__
    try:
        for source in find_program(answer, prompt, sorted(set(names))).sources:
            exec(compile(source, "<program>", "exec", dont_inherit=True), space)
        exec(test, space)
    except Exception:
        return False
    return True


def continues(answer: str) -> bool:
    return passes(answer, PROMPT, "assert total([]) == 0 and total([1, 2]) == 6")


def block(code: str, info: str = "python", fence: str = "```") -> str:
    return f"{fence}{info}\n{code}{fence}\n"


# A right program with everything that answers wrap around it. {} is the program, with a line break behind it.
WRAPPINGS = {
    "bare": "{}",
    "fence": "Here it is:\n```python\n{}```\nIt's done.",
    "untagged": "```\n{}```",
    "tildes": "~~~python\n{}~~~",
    "longer fence": "`````python\n{}`````\nDone.",
    "longer closing fence": "```python\n{}````\nDone.",
    "shorter closing fence": "````python\n{}```\nIt's done.",
    "spaces": "  ``` python  \n{}  ```  \n",
    "name and case": "```Python3\n{}```",
    "py": "```py\n{}```",
    "title": '```python title="solution.py"\n{}```',
    "attributes": "```{{.python .numberLines}}\n{}```",
    "file": "```python:solution.py\n{}```",
    "file, as an attribute": "```python name=solution.py linenos=true\n{}```",
    "another tag": "```plaintext\n{}```",
    "never closed": "```python\n{}",
    "never closed, with text": "```python\n{}\nThis isn't hard.\nIt returns.",
    "text behind the closing fence": "```python\n{}```.\nDone.",
    "end token behind the closing fence": "```python\n{}```<|im_end|>",
    "opened behind text": "The code: ```python\n{}```\nDone.",
    "opened by the prompt": "{}```",
    "opened by the prompt, with text": "{}```\n\nThis isn't hard.\n",
    "opened by the prompt, with an example": "{}```\n\nIt's used so:\n\n```python\nprint(NAME)\n```\n",
    "opened by the prompt, with another program": "{}```\n\nOr:\n\n```python\ndef NAME(x):\n    return -1\n```\n",
    "opened by the prompt, which did not name the language": "python\n{}```",
    "twice opened": "```\n```python\n{}```\n```",
    "in a longer fence": "````\n```python\n{}```\n````",
    "in a document": "````markdown\n# Answer\n```python\n{}```\n````",
    "CRLF": "```python\r\n{}```\r\n",
    "CR": "```python\r{}```\r",
    "byte order mark": "\ufeff{}",
    "byte order mark in the block": "```python\n\ufeff{}```",
    "invisible characters in the text": "\u200bSo:\xa0\n```python\n{}```\xa0\n\u200b",
    "no-break space behind": "{}\n\xa0\n",
    "MBPP's tags": "[BEGIN]\n{}[DONE]\n",
    "MBPP's end tag": "{}[DONE]",
    "MBPP's next problem": "{}[DONE]\n\nYou are an expert.\n[BEGIN]\ndef NAME(x):\n    return -1\n[DONE]",
    "Code Llama's tags": "[PYTHON]\n{}[/PYTHON]\nIt's done.\n[TESTS]\nassert NAME(1) == 9\n[/TESTS]",
    "HTML": '<pre><code class="language-python">\n{}</code></pre>',
    "answer": "<answer>\n{}</answer>",
    "answer with a fence": "<answer>\n```python\n{}```\n</answer>",
    "tags in a fence": "```python\n<code>\n{}</code>\n```",
    "tags on the first line": "<code>{}</code>\nDone.",
    "end token": "{}<|im_end|>\n",
    "end token in the block": "```python\n{}<|im_end|>\n```",
    "cut-off end token": "{}<|",
    "full-width end token": "{}<｜end▁of▁sentence｜>",
    "tokens around": "<|im_start|>assistant\n{}<|im_end|>",
    "start token": "<s> {}</s>",
    "what follows an end token": "{}<|endoftext|>\ndef NAME(x):\n    return -1\n",
    "thought": "<think>\n```python\ndef NAME(x):\n    return -1\n```\n</think>\n```python\n{}```",
    "thought, bare": "def NAME(x): return -1? No.</think>\n\n{}",
    "corrected": "```python\ndef NAME(x):\n    return -1\n```\nNo, better:\n```python\n{}```",
    "shell": "```bash\npip install x\n```\n```python\n{}```\n```bash\nNAME=1 python x.py\n```",
    "output": "```python\n{}```\nOutput:\n```\n1\n```",
    "session": "```python\n{}```\n```python\n>>> NAME(1)\n1\n```",
    "data": "```python\n{}```\n```toml\nNAME = 1\n```",
    "Scala, which Python can read": "```python\n{}```\n```scala\ndef NAME(x: Int): Int = x\n```",
    "example": "```python\n{}```\nUse:\n```python\nresult = NAME\nprint(NAME)\n```",
    "result of the same name": "```python\n{}```\n```python\nNAME = NAME(3)\n```",
    "tests": "```python\n{}```\n```python\nfrom solution import NAME\nassert NAME(1) == 9\n```",
    "stub": '```python\n{}```\n```python\ndef NAME(x):\n    """To do."""\n    pass\n```',
    "ellipsis": "```python\n{}```\n```python\ndef NAME(x): ...\n```",
    "excerpt": "```python\n{}```\n```python\ndef NAME(x):\n    ...\n    return y\n```",
    "stub that raises": "```python\n{}```\n```python\ndef NAME(x):\n    raise NotImplementedError('to do')\n```",
    "broken repetition": "```python\n{}```\n```python\ndef NAME(x):\n```",
    "stub before": "```python\ndef NAME(x):\n    pass\n```\n```python\n{}```",
    "heading": "**Solution**\n\n{}\n**Explanation**: it's simple.",
    "code-like text before": "import of modules is simple.\nfrom here on:\n\n{}",
    "usage": "{}\nprint(NAME(1, 2, 3))\nassert False",
    "usage with a result": "{}\nresult = NAME(1, 2, 3)\nprint(result)",
    "usage with input": "{}\nn = int(input())\nprint(NAME(n))",
    "main": "{}\nif __name__ == '__main__':\n    print(NAME(1, 2, 3))",
    "annotations that are text": "{}\nTime: O\nSpace: O\n",
    "Python 2 behind": "{}\nprint NAME(1)\n",
    "cut off": "{}\ndef main():\n    print(NAME(",
    "usage in a fence": "{}\nExample:\n```python\nprint(NAME)\n```",
}
INSIDE = '''def f(x):
    """Give it back.
    ```
    f(1)
    ```
    """
    s = "<code>[DONE]</s><|im_end|>"  # see ```f```
    return x
'''
PROGRAMS = {
    "function": ONE,
    "fences and tags in strings": INSIDE,
    "fences at a margin": 'def f(x):\n  """Give it back.\n  ```python\n  f(1)\n```\n```\n  """\n  return x\n',
    "helpers": "import math\nfrom typing import List\n\nA = 1\n\n\n@staticmethod\ndef g(x):\n    return A * x\n\n\n"
    "def f(x: int):\n    return math.floor(g(x))\n",
    "lambda": "f = lambda x: x\n",
    "decorated later": "def f(x):\n    return x\nf = staticmethod(f)\n",
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_programs_in_wrappings(wrapping: str) -> None:
    form = WRAPPINGS[wrapping]
    for name, code in PROGRAMS.items():
        if name == "fences at a margin" and "````" in form:
            continue  # a fence of four does not read it otherwise; one that is closed by three can't be told apart
        assert passes(code), name
        answer = form.replace("NAME", "f").format(code)
        assert passes(answer.replace("\n", "\r") if wrapping == "CR" else answer), name
    assert continues(form.replace("NAME", "total").format(FULL))


@pytest.mark.parametrize(
    "wrapping",
    [
        name
        for name in WRAPPINGS
        if name
        not in {
            "corrected", "no-break space behind", "thought, bare", "code-like text before", "heading",
            "tags on the first line", "start token",
        }
    ],
)  # fmt: skip
def test_continuations_in_wrappings(wrapping: str) -> None:
    """HumanEval: the body alone, as it is, and without its indentation where a fence says where it ends."""
    form = WRAPPINGS[wrapping].replace("NAME", "total")
    assert continues(form.format(BODY))
    if form.startswith("```"):
        assert continues(form.format(textwrap.dedent(BODY)))


@pytest.mark.parametrize(
    "answer",
    [
        # fences
        f"1. So:\n\n   ```python\n{textwrap.indent(ONE, '   ')}   ```\n2. Done.",
        f"10. So:\n\n    ```python\n{textwrap.indent(ONE, '    ')}    ```\n",
        f"- ```python\n{textwrap.indent(ONE, '  ')}  ```",
        "".join(f"> {line}\n" for line in block(ONE).split("\n")),
        f"So:\n\n{textwrap.indent(ONE, '    ')}\nDone.",
        "```python def f(x): return x```",
        "Answer: ```py def f(x): return x``` Done.",
        "```def f(x): return x```",
        "```python def f(x):\n    return x\n```",
        "```python import math\ndef f(x):\n    return math.floor(x)\n```",
        f"```{ONE}```",
        "```python\ndef f(x):\n    return x```",
        f"```python\ndef f(x):\n    return x```\nTest:\n{block('print(f(1))' + chr(10))}",
        "```python\ndef g(x):\n    return x```\nand\n```python\ndef f(x):\n    return g(x)```\n",
        "def f(x):\n    return x```\nIt's done.",
        f"def f(x):\n    return x```\nOr:\n{OTHER}```\n",
        f"Use ```f(`x`).\n{block(ONE)}",  # CommonMark: behind such a fence no backtick may stand
        "@staticmethod\ndef f(x):\n    return x\n",
        "def f(x):\n    return x</s>",
        "def f(x):\n    return x<|im_end|>",
        "def f(x):\n    return x[DONE]",
        f"{PY}import math\n\n{PY}def f(x):\n    return math.floor(x)\n{END}",  # the first was never closed
        f"{PY}DONE = 0\nSTATES = [5]\ndef f(x):\n    s = STATES[DONE]\n    return x\n{END}",
        # several blocks
        block("import math\n") + block("def f(x):\n    return math.floor(x)\n"),
        block("def g(x):\n    return x\nprint(g(1))\nassert g(2) == 3\n") + block("def f(x):\n    return g(x)\n"),
        block("def f(x):\n    return g(x)\n") + block("def g(x):\n    return h(x)\n") + block("def h(x): return x\n"),
        block("A = 1\n") + block("def g(x): return x * A\n") + block("def f(x): return g(x)\n") + block("f(1, 2)\n"),
        block("def g(x): return x\ndef f(x): return g(x) + 1\n") + "Fixed:" + block("def f(x):\n    return g(x)\n"),
        block("def g(x): return 9\n") + block("def g(x): return x\n") + block("def f(x): return g(x)\n"),
        block("def f(x): return g(x)\n") + block("def g(x): return x\ndef f(x): return -1\nprint(f(1, 2))\n")
        + block("def f(x): return g(x)\n"),
        block("table = []\nfor i in range(9):\n    table += [i]\n") + block("def f(x): return table[x]\n"),
        block("from math import floor as f\n") + block("print(f(1))\n"),
        # text
        "def f(x):\n    return g(x)\n\nprint(f(1, 2))\n\ndef g(x):\n    return x\n",
        "def f(x):\n    return x * A\n\nA = 1\nprint(f(1, 2))",
        "We need:\n\nimport math\n\nAnd it's used so:\n\ndef f(x):\n    return math.floor(x)\n\nDone.",
        f"def f(x):\n    pass\n\nAll of it:\n\n{ONE}",
        f"class Solution:\n    def f(self, x):\n        return x\n\n{ONE}",
        "from math import floor as f",
    ],
)  # fmt: skip
def test_programs(answer: str) -> None:
    assert passes(answer)


@pytest.mark.parametrize(
    "answer",
    [
        BODY.lstrip(),  # a tokenizer took the first spaces
        textwrap.dedent(BODY) + "\nThis isn't hard.",
        "if not values: return 0\nreturn 2 * sum(values)",
        "if not values:\n    return 0\nreturn 2 * sum(values)",
        "def add(a, b):\n    return a + b\nreturn add(sum(values), sum(values))",
        "    return sum(map(double, values))\n\n\ndef double(x):\n    return 2 * x\n\n\nprint(total())\n",
        "    return D * sum(values)\n\nIt's with:\n\nD = 2\n",
        "    def inner(x):\n        return 2 * x\n    return inner(sum(values))",
        f"Here's the rest:\n\n{BODY}",
        BODY.rstrip() + "<|im_end|>",
        BODY.rstrip() + "```\nDone.",
        BODY + "    ```\nDone.",
        BODY + "\n\ndef total(values):\n    raise ValueError\n",
        BODY + "\n# Explanation: the sum's twice as 'large\n",
        BODY + '\n"""\nIt\'s done.\n',
        "```python return 2 * sum(values)```",
        f"```python {BODY.lstrip()}```",
        f"```python low, high = 0, 1\n{BODY}```",
        "```python for value in values:\n        pass\n    return 2 * sum(values)\n```",
        block("def double(x): return 2 * x\n") + block("    return double(sum(values))\n"),
        block("    return double(sum(values))\n") + block("def double(x): return 2 * x\n"),
        block("from __future__ import annotations\ndef total(values: List[int]):\n" + BODY),  # the prompt's imports
        block("def total(values):\n    return math.floor(twice(sum(values)))\n"),
    ],
)
def test_continuations(answer: str) -> None:
    assert continues(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "", "\n", "I can't.", "```", "``````", "```python\n```", "`def f(x): return x`", "\0", "\ufeff",
        block("def f(x)\n    return x\n"),
        block("def f(x):\n    print 'a'\n    return x\n"),
        block("def f(x):\n    return x\nprint f(1)\n"),  # a block is run as it is
        block("def f(x):\n    return x\nassert f(1) == 2\n"),
        block("def f(x):\n    pass\n"),
        block("class Solution:\n    def f(self, x):\n        return x\n"),
        "class Solution:\n\n    @staticmethod\n    def f(x):\n        return x\n",
        "def f(x):\n    print 'a'\n    return x\n",
        block("def f(x):\n\xa0\xa0\xa0\xa0return x\n"), "def f(x):\n\xa0\xa0\xa0\xa0return x\n",
        block("\u200bdef f(x):\n    return x\n"), block("def f(x):\n\ufeff    return x\n"),
        block("def f(x):\n    return “x”\n"),
        block("def f(x):\n    return '\ud800' and x\n"),
        f"{ONE}</think>\nI can't.",
        block(ONE) + "No:\n" + block(OTHER),
    ],
)  # fmt: skip
def test_answers_without_a_right_program(answer: str) -> None:
    assert not passes(answer)


@pytest.mark.parametrize("answer", ["Sure!", "    pass\n", "Use `2 * sum(values)`.", f"    print 'a'\n{BODY}"])
def test_answers_without_a_continuation(answer: str) -> None:
    assert not continues(answer)


def test_several_names() -> None:
    pair = "class Pair:\n    def __init__(self, a):\n        self.a = a\n"
    first = "def f(pairs):\n    return pairs[0].a\n"
    for answer in (pair + first, block(pair) + block(first), block(first) + block(pair), f"{pair}\nIt's:\n\n{first}"):
        assert passes(answer, test="assert f([Pair(5)]) == 5")


def test_how_it_was_found() -> None:
    for answer, found in [
        (BODY, "continuation"), (block(FULL), "fenced block"), (block(BODY), "fenced continuation"),
        (FULL, "code in text"), ("I can't.", "nothing"),
    ]:  # fmt: skip
        assert find_program(answer, PROMPT, ["total"]).found == found
    assert find_program("I can't.", "", ["f"]) == ([], "nothing")


@pytest.mark.parametrize(
    "answer",
    ["```\n" * 50_000, "def g(x):\nIt isn't so.\n" * 8000, "(" * 200_000, "<a " * 70_000, "> " * 100_000],
)
def test_huge_answers_end(answer: str) -> None:
    begin = time.process_time()
    assert not passes(answer)
    assert time.process_time() - begin < 10  # quadratic work would take minutes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HumanEval", "MBPP"])
def test_reference_solutions_in_wrappings(bench_data: Path, name: str) -> None:
    """What is found of a reference solution, however it is wrapped, runs and defines what the tests call."""
    with gzip.open(bench_data / f"{name}.jsonl.gz", "rt") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    for row in rows:
        task = task_of(row, challenge=False)
        code = (row["prompt"] + row["canonical_solution"]) if name == "HumanEval" else row["code"]
        code = code.replace("\r\n", "\n").rstrip() + "\n"
        for form in WRAPPINGS.values():
            sources = find_program(form.replace("NAME", task["names"][0]).format(code), task["prompt"], task["names"])
            space: dict[str, Any] = {"__name__": "program"}
            for source in sources.sources:
                exec(compile(source, "<program>", "exec", dont_inherit=True), space)
            assert set(task["names"]) <= set(space), (row["task_id"], form)
