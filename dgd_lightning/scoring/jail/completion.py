"""The program in a model's answer. It runs inside the sandbox: parsing hostile text can bring an interpreter down.

An answer is read as CommonMark reads fenced code (spec.commonmark.org, "Fenced code blocks"), and where that leaves
open what a block is, the block is what Python can compile. The rules, and where each comes from: docs/scoring.md.
"""

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

MAX_TEXT = 200_000  # characters of an answer that are looked at; programs of these data sets have a few thousand
BLOCKS, FENCES, CUTS = 50, 20, 50  # at most: blocks of an answer, ends tried for a block, cuts tried for a program
TRIED = 3_000_000  # characters that are tried as programs in a text without fences

THOUGHT = re.compile(r"</think(?:ing)?>|</thought>|</reasoning>|\[/THINK\]")
DONE = re.compile(r"\[DONE\][ \t]*$", re.M)
TAG = r"<[|｜][^<>\n]{0,40}>?|</?[A-Za-z]\w{0,40}(?: [^<>\n]{0,99})?>|\[/?[A-Z]{2,20}\]"  # <|im_end|>, <code>, [PYTHON]
TAG_LINE = re.compile(rf"[ \t]*(?:{TAG}|python3?)?[ \t]*")
STOP = re.compile(rf"`{{3,}}|~{{3,}}|{TAG}")  # what may follow a program on its own last line
FENCE = re.compile(r"^[ \t>]*(?P<tilde>~{3,})(?P<title>.*)|(?P<tick>`{3,})(?P<info>.*)")
LANGUAGE = re.compile(r"[\s{.]*(?:lang(?:uage)?-)?(?P<name>[\w#+]*)")
PYTHON = re.compile(r"(?:i?python|py)\d*")
STATEMENT = r"(?:(?:import|from|class|def|async[ \t]+def)[ \t]+\w|@\w|[A-Za-z_]\w*[ \t]*(?::[^=\n]{1,80})?=(?!=))"
START = re.compile(rf"(?:(?:[ \t]*(?:{TAG})[ \t]*){{1,3}}|(?P<indent>[ \t]*))(?={STATEMENT})")
SEVERAL = r"\w+(?:, ?\w+)+ ?=(?!=)"  # names that are assigned to together
ONE = rf"(?!\w+=[\w/.]*[A-Za-z]){STATEMENT}"  # not file=x.py
FIRST = re.compile(rf"(?:return|yield|for|while|if|with|try)\b|{SEVERAL}|{ONE}")


class Program(NamedTuple):
    """Sources that run one after the other in one namespace, and how they were found."""

    sources: list[str]
    found: str  # "fenced block", "fenced continuation", "code in text", "continuation" or "nothing"


class Block(NamedTuple):
    """A fenced block."""

    code: str
    python: bool  # its language is Python, or not named
    closed: bool  # what is not closed may be followed by text
    lines: range  # of the answer


class Facts(NamedTuple):
    """What a source that compiles does at its top level."""

    tree: ast.Module
    bound: set[str]
    defined: set[str]  # bound by more than an import, and not made of what they were (f = f(3))
    stubs: set[str]  # functions and classes without a body
    needs: set[str]  # names that it uses and does not bind


def find_program(answer: str, prompt: str, names: list[str]) -> Program:
    """The program that an answer means. docs/scoring.md ("Which program is it?") has the rules and their sources.

    Args:
        answer: what the model wrote.
        prompt: the first part of the program (HumanEval), or "" where the prompt is no code (MBPP).
        names: what the program must define.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return _Answer(answer, prompt, names).program()


class _Answer:
    def __init__(self, answer: str, prompt: str, names: list[str]) -> None:
        text = THOUGHT.split(answer)[-1].replace("\r\n", "\n").replace("\r", "\n")[:MAX_TEXT]
        done = DONE.search(text)
        if done and "DONE" not in text[: done.start()]:  # else it may be a name of the program's
            text = text[: done.start()]
        self.lines = _bare(text.split("\n"))
        self.prompt, self.names = prompt, names
        found = [re.search(rf"^(?:async +)?(?:def|class) +{re.escape(name)}\b", prompt, re.M) for name in names]
        starts = [start.start() for start in found if start]
        self.preamble = [prompt[: min(starts)]] if starts else []  # what precedes the function that the prompt begins
        self.given = {name for source in self.preamble if (facts := _facts(source)) for name in facts.bound}
        self.blocks = _fenced(self.lines) if _fault("\n".join(self.lines)) is not None else []

    def program(self) -> Program:
        """The first of these that is there."""
        codes = [block.code if block.closed else _longest(block.code) for block in self.blocks]
        python = [code if block.python else "" for code, block in zip(codes, self.blocks, strict=True)]
        outside = "\n".join(self._outside())
        segments = _segments(outside, self.names)
        return (
            self._opened_by_the_prompt()
            or self._defined(python, "fenced block", last=True)
            or self._in_text(outside, segments)
            or self._continued_in_blocks(python, strict=True)
            or self._defined(codes, "fenced block", last=True)
            or self._continued_in_blocks(codes, strict=True, tagged=True)
            or self._defined(codes, "fenced block", last=True, weak=True)
            or self._defined(segments, "code in text", weak=True)
            or self._continued_in_blocks(python, strict=False)
            or self._continued(outside, segments, strict=False)
            or self._as_it_is(python)
        )

    def _outside(self) -> list[str]:
        """The answer's lines, without closed blocks: what is wrong in those is not mended as text."""
        closed = {line for block in self.blocks if block.closed for line in block.lines}
        return ["" if number in closed else line for number, line in enumerate(self.lines)]

    def _opened_by_the_prompt(self) -> Program | None:
        """An answer that begins with code and goes on behind a bare fence: the prompt had opened the block."""
        first = self.lines[0] if self.lines else ""
        if not (FIRST.match(first) or START.match(first) or (self.prompt and first[:1].isspace())):
            return None
        end, head = _end(self.lines, 0, "```")
        if end == len(self.lines) or not (head or set(self.lines[end].strip()) == {"`"}):
            return None
        text = "\n".join([*self.lines[:end], head])
        return self._in_text(text, _segments(text, self.names))

    def _in_text(self, text: str, segments: list[str]) -> Program | None:
        defined = self._defined(segments, "code in text")
        if text.lstrip("\n")[:1].isspace():
            return self._continued(text, segments, strict=True) or defined
        return defined or self._continued(text, segments, strict=True)

    def _defined(self, codes: list[str], found: str, *, last: bool = False, weak: bool = False) -> Program | None:
        """The last or first code that defines all names (else of each name), with what it needs of the others.

        ``weak``: stubs and imports define too.
        """
        facts = [_facts(code) for code in codes]
        defined = [(each.bound if weak else each.defined - each.stubs) if each else set() for each in facts]
        order = range(len(codes))[:: -1 if last else 1]
        wanted = [set(self.names)] if any(set(self.names) <= each for each in defined) else [{n} for n in self.names]
        main = {number for names in wanted for number in islice((n for n in order if names <= defined[n]), 1)}
        return Program([*self.preamble, *_assembled(codes, main, self.given)], found) if main else None

    def _continued_in_blocks(self, codes: list[str], *, strict: bool, tagged: bool = False) -> Program | None:
        """The prompt, continued by the last block that can; with ``tagged`` by one of another language too."""
        for number in range(len(codes))[::-1]:
            block = self.blocks[number]
            code = self._continuation(block.code, whole=block.closed, strict=strict) if block.python or tagged else None
            if code:
                codes = [*codes[:number], code, *codes[number + 1 :]]
                return Program(_assembled(codes, {number}, set()), "fenced continuation")
        return None

    def _continued(self, text: str, segments: list[str], *, strict: bool) -> Program | None:
        lines = text.split("\n")
        indented = next((number for number, line in enumerate(lines) if line.strip() and line[0].isspace()), 0)
        for start in (0, indented):
            if code := self._continuation("\n".join(lines[start:]), whole=False, strict=strict):
                return Program(_assembled([code, *segments], {0}, set()), "continuation")
        return None

    def _continuation(self, code: str, *, whole: bool, strict: bool) -> str | None:
        """The prompt and its continuation, whose first line may have lost its indentation, or all of them.

        Args:
            code: the continuation.
            whole: it is all of a block; else text may follow.
            strict: a continuation must return or yield something; else do something.
        """
        head = self.prompt if self.prompt.endswith("\n") else self.prompt + "\n"
        last = head.rstrip().rsplit("\n", 1)[-1]
        pad = last[: len(last) - len(last.lstrip())] or "    "
        variants = [(head + code, ""), (head + pad + code.lstrip(), "")]
        variants += [(head + textwrap.indent(textwrap.dedent(code), pad), pad)]
        variants += [(self.prompt + code, "")] if head != self.prompt else []
        best = ""
        for variant, base in variants:
            source = variant if whole else _longest(variant, self.prompt.count("\n"), base)
            facts = _facts(source)
            entries = [node for node in facts.tree.body if _name(node) in self.names] if facts else []
            if entries and not _is_stub(entries[0]) and (not strict or _returns(entries[0])):
                best = max(best, source, key=lambda text: text.count("\n") if text else -1)  # of equal ones the first
        return best and (best if whole else _without_usage(best, self.names))

    def _as_it_is(self, codes: list[str]) -> Program:
        """A block that can't be the program, so that running it says why."""
        for pattern in (rf"^\s*(?:def|class)\s+(?:{'|'.join(map(re.escape, self.names))})\b", r"\S"):
            for code in reversed(codes):
                if re.search(pattern, code, re.M):
                    return Program([*self.preamble, code], "fenced block")
        return Program([], "nothing")


def _bare(lines: list[str]) -> list[str]:
    """Without a byte order mark, and without blank lines and tags that stand alone, before and behind."""
    lines = [lines[0].removeprefix("\ufeff"), *lines[1:]] if lines else []
    numbers = [number for number, line in enumerate(lines) if not TAG_LINE.fullmatch(line)]
    return lines[numbers[0] : numbers[-1] + 1] if numbers else []


def _fenced(lines: list[str]) -> list[Block]:
    """The fenced blocks, also those that open behind text on the same line or have code there."""
    lines, number = list(lines), 0
    blocks: list[Block] = []
    while number < len(lines) and len(blocks) < BLOCKS:
        found = FENCE.search(lines[number])
        fence = found and (found["tilde"] or found["tick"])
        if not found or not fence:
            number += 1
            continue
        info = found["title"] if found["tilde"] else found["info"]
        word = LANGUAGE.match(info)
        python = PYTHON.fullmatch(word["name"].lower()) is not None if word else False
        rest = info[word.end() :].strip() if word and python else info.strip()
        first = rest if FIRST.match(rest) else ""
        if found["tick"] and fence in info:  # all on one line
            code, _, behind = rest.partition(fence)
            blocks.append(Block(code.strip(), python or bool(first), True, range(0)))
            lines[number] = behind
            continue
        if found["tick"] and "`" in info:
            number += 1
            continue
        named = bool(word and word["name"]) and not python and not first
        indent = _indent(lines[number]) if not lines[number][: found.start()].strip() else 0
        end, head = _end(lines, number + 1, fence, indent)
        inside = lines[number + 1 : end] + ([head] if head else [])
        closed = bool(head) or (end < len(lines) and not lines[end].strip(" \t>" + fence[0]))
        document = word and word["name"].lower() in ("markdown", "md")
        if inside and (document or (len(fence) > 3 and FENCE.match(inside[0]))):  # what it holds is an answer itself
            blocks += [block._replace(lines=range(number, end + 1)) for block in _fenced(inside)]
            number = end + closed
            continue
        if all(line.lstrip()[:1] in ("", ">") for line in inside):  # a block quote's
            inside = [line.lstrip()[1:].removeprefix(" ") for line in inside]
        code = "\n".join(_bare(inside))
        lost = next((line[: len(line) - len(line.lstrip())] for line in inside if line.strip()), "")  # of a body's line
        if first and (_parses([first, *inside]) or _parses([lost + first, *inside]) or not _parses(inside)):
            code = f"{first}\n{code}"
        code = textwrap.dedent(code)
        blocks.append(Block(_cut_at_stop(code) if closed else code, not named, closed, range(number, end + 1)))
        number = end + closed
    return blocks


def _end(lines: list[str], start: int, fence: str, indent: int = 0) -> tuple[int, str]:
    """Where code ends that begins at a line, and what of this line is code.

    A fence ends it: one at least as long, of the same character, indented less than four columns more, alone on its
    line; or one that opens the next block. In a docstring it ends nothing, so that of several the first counts up to
    which the code parses. Where it parses up to none, the fence may stand behind the last line of code.
    """
    ends, inside = [], []
    for number in range(start, len(lines)):
        bare = lines[number].strip(" \t>")
        if bare.startswith(fence) and fence[0] not in bare.lstrip(fence[0]) and _indent(lines[number]) - indent < 4:
            ends.append(number)
        elif fence in lines[number] and lines[number].partition(fence)[0].strip():
            inside.append(number)
        if len(ends) == FENCES:
            break
    for number in ends:
        if _parses(lines[start:number]):
            return number, ""
    for number in inside[:FENCES]:
        before, head = lines[start:number], lines[number].partition(fence)[0]
        if _parses([*before, head]) and not _parses([*before, lines[number]]):  # where it does, it is in a comment
            return number, head
    return (ends[0] if ends else len(lines)), ""


def _indent(line: str) -> int:
    line = line.expandtabs(4)
    return len(line) - len(line.lstrip(" >"))


def _parses(lines: list[str]) -> bool:
    """True for the inside of a function too."""
    try:
        ast.parse(textwrap.dedent("\n".join(_bare(lines))))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True


def _fault(source: str) -> int | None:
    """The line, counted from 0, that Python refuses; None: it compiles."""
    try:
        compile(source, "<answer>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return max((error.lineno or 1) - 1, 0)
    except (ValueError, RecursionError, MemoryError, OverflowError):  # NUL, lone surrogates; nested too deep
        return 0
    return None


def _cut_at_stop(source: str) -> str:
    """A program behind whose last line a tag or a fence stands, without it; any other as it is."""
    fault = _fault(source)
    lines = source.split("\n")
    if fault is not None and fault < len(lines):
        for stop in [*STOP.finditer(lines[fault])][:-6:-1]:
            cut = "\n".join([*lines[:fault], lines[fault][: stop.start()].rstrip()])
            if _fault(cut) is None:
                return cut
    return source


def _longest(source: str, keep: int = 0, base: str = "") -> str:
    """The longest prefix that compiles, found by cutting away the statement of each error.

    Args:
        source: a program with text behind it.
        keep: so many lines are not cut away.
        base: the indentation of statements that may be cut off; what is indented more goes with its statement.
    """
    lines = source.split("\n")
    for _ in range(CUTS):
        source = _cut_at_stop("\n".join(lines))
        fault = _fault(source)
        if fault is None:
            return source
        lines = lines[: fault + 1]
        while len(lines) > keep and lines[-1].removeprefix(base)[:1] in " \t\f":  # "" too
            lines.pop()
        if len(lines) <= keep:
            break
        lines.pop()
    return "\n".join(lines[:keep])


@lru_cache(maxsize=1000)
def _facts(source: str) -> Facts | None:
    """None: it does not compile, or is empty."""
    if not source.strip() or _fault(source) is not None:
        return None
    tree = ast.parse(source)
    top = symtable.symtable(source, "<answer>", "exec")
    tables, assigned, imported, used = [top], set(), set(), set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is top or symbol.is_global():
                assigned |= {symbol.get_name()} if symbol.is_assigned() else set()
                imported |= {symbol.get_name()} if symbol.is_imported() else set()
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
    last = {_name(node): node for node in tree.body}
    stubs = {name for name, node in last.items() if name and _is_stub(node)}
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    own = {name for node in assignments for name in _ids(node.targets) & _ids([node.value])} - set(last)
    bound = assigned | imported
    needs = used - bound - set(dir(builtins))
    return Facts(tree, bound, assigned - own, stubs, needs)


def _ids(nodes: list[ast.expr]) -> set[str]:
    return {each.id for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name)}


def _name(node: ast.stmt) -> str | None:
    return node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else None


def _is_stub(node: ast.stmt) -> bool:
    """A function or class that is only announced, or shown with `...` in place of lines."""
    acts, elided = [], False
    for each in getattr(node, "body", []):
        constant = each.value if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) else None
        elided = elided or (constant is not None and constant.value is ...)
        acts += [] if constant or isinstance(each, ast.Pass) else [each]
    raises = bool(acts) and isinstance(acts[0], ast.Raise) and "NotImplementedError" in ast.dump(acts[0])
    return not acts or raises or elided


def _returns(function: ast.stmt) -> bool:
    nodes: list[ast.AST] = list(ast.iter_child_nodes(function))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return False


def _segments(text: str, names: list[str]) -> list[str]:
    """The programs in a text without fences, each from its first line of code as far as it compiles."""
    lines, number, tried = text.split("\n"), 0, 0
    segments: list[str] = []
    while number < len(lines) and len(segments) < BLOCKS and tried < TRIED:
        start = START.match(lines[number])
        if not start:
            number += 1
            continue
        indent = start["indent"] or ""
        inside = [lines[number][start.end() :]]
        for line in lines[number + 1 :]:
            if line.strip() and not line.startswith(indent):
                break
            inside.append(line.removeprefix(indent))
        tried += sum(map(len, inside))
        code = _without_usage(_longest("\n".join(inside)), names)
        if code.strip():
            segments.append(code)
        number += max(1, code.rstrip().count("\n") + 1)
    return segments


def _without_usage(source: str, names: list[str]) -> str:
    """Up to the first statement behind the definitions of the names that is no definition and no import.

    A second definition of a name ends it too.
    """
    facts = _facts(source)
    wanted = set(names) & facts.defined if facts else set()
    left = set(wanted)
    for node in facts.tree.body if facts and wanted else ():
        targets = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
        again = _name(node) in wanted
        made = isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and bool(targets & wanted)
        kept = made or _name(node) is not None or isinstance(node, ast.Import | ast.ImportFrom)
        if not left and (again or not kept):
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            return "\n".join(source.split("\n")[: first - 1])
        left -= targets | {_name(node)}
    return source


def _assembled(codes: list[str], main: set[int], given: set[str]) -> list[str]:
    """The main codes, and before and behind them the definitions of others that they need, and those need."""
    facts = [_facts(code) for code in codes]
    chosen, last = set(main), max(main)
    order = [*range(last)[::-1], *range(last + 1, len(codes))]  # the nearest before it, else the first behind it
    while True:
        bound = given.union(*(each.bound for number in chosen if (each := facts[number])))
        missing = set().union(*(each.needs for number in chosen if (each := facts[number]))) - bound
        more = next((n for n in order if n not in chosen and (each := facts[n]) and each.bound & missing), None)
        if more is None:
            break
        chosen.add(more)
    owned = set().union(*(each.bound for number in main if (each := facts[number])))
    return [
        codes[number] if number in main else _definitions(facts[number], owned if number > last else set())
        for number in sorted(chosen)
    ]


def _definitions(facts: Facts | None, without: set[str]) -> str:
    """A source without its bare expressions and assertions, and without definitions of some names."""
    body = facts.tree.body if facts else []
    kept = [node for node in body if not isinstance(node, ast.Expr | ast.Assert) and _name(node) not in without]
    return ast.unparse(ast.Module(kept, []))
