"""Stand-alone program: compares two results with math-verify, one JSON line in, one out, until stdin ends.

It may hang or eat memory on hostile input. Processor time of a comparison is limited by a timer whose signal nobody
handles, so the kernel ends this process, whatever it is busy with; `math_grader.py` starts another. Only LaTeX is
parsed, by a grammar; math-verify's plain expressions go through ``eval`` and are never used.
"""

import contextlib
import io
import json
import logging
import resource
import signal
import sys
from dataclasses import replace
from typing import Any

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import normalize_latex
from math_verify import LatexExtractionConfig, verify
from math_verify.grader import should_treat_as_complex
from math_verify.parser import get_last_eq
from sympy import And, Eq, FiniteSet, Union
from sympy.core.relational import Relational

NORMAL = replace(LatexExtractionConfig().normalization_config, boxed="none")
CASES = ConversionConfig(lowercase_symbols=False)
DIGITS = 100  # irrational numbers that agree to so many are equal; others are compared exactly


def compare(gold: str, answer: str) -> dict[str, bool | str]:
    """Whether two results (LaTeX without dollar signs and decimals) have one value, and how each was read."""
    read = [parse(text) for text in (gold, answer)]
    equal = None not in read and verify(
        *read, numeric_precision=DIGITS, allow_set_relation_comp=True, timeout_seconds=None
    )
    words = ["" if found is None else str(found)[:200] for found in read]
    return {"equal": bool(equal), "gold": words[0], "answer": words[1]}


def parse(text: str) -> Any:
    """As math-verify's ``parse``, but R is not r, and x < 2 or x > 3 is a union; None where it can't be read."""
    text = normalize_latex(text, NORMAL)
    for form in dict.fromkeys((text, get_last_eq(text))):
        with contextlib.suppress(Exception):
            found = latex2sympy(
                form, is_real=not should_treat_as_complex(form), normalization_config=None, conversion_config=CASES
            )
            parts = found.args if isinstance(found, FiniteSet) else ()
            ranges = len(parts) > 1 and all(isinstance(one, And | Relational) and not one.has(Eq) for one in parts)
            return Union(*(one.as_set() for one in parts)) if ranges else found
    return None


def main() -> None:
    """Serve, with a limit of MiB and one of seconds as arguments; the first line says that this is ready."""
    logging.disable(logging.CRITICAL)
    limit, seconds = int(sys.argv[1]) << 20, float(sys.argv[2])
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, sys.stdout = sys.stdout, io.StringIO()  # what the libraries print is no answer
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = compare(**json.loads(line))
        except Exception as error:
            reply = {"equal": False, "error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
