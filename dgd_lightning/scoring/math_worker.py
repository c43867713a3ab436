"""Stand-alone program: compares two results with math-verify, one JSON line in, one out, until stdin ends.

It may hang or eat memory on hostile input: whoever started it kills it (`math_pool.py`). Only LaTeX is parsed, by a
grammar; math-verify's plain expressions go through ``eval`` and are never used.
"""

from __future__ import annotations

import io
import json
import logging
import resource
import sys

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

LATEX = [LatexExtractionConfig()]


def compare(gold: str, answer: str) -> dict[str, bool | str]:
    """Whether two results (LaTeX without dollar signs) have one value, and how each was read."""
    read = [parse(f"${text}$", extraction_config=LATEX, parsing_timeout=None) for text in (gold, answer)]
    equal = all(read) and verify(read[0], read[1], timeout_seconds=None)
    words = [str(found[0])[:200] if found else "" for found in read]
    return {"equal": bool(equal), "gold": words[0], "answer": words[1]}


def main() -> None:
    """Serve; the first line says that this is ready."""
    logging.disable(logging.CRITICAL)
    limit = int(sys.argv[1]) << 20
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, sys.stdout = sys.stdout, io.StringIO()  # what the libraries print is no answer
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        try:
            reply = compare(**json.loads(line))
        except Exception as error:
            reply = {"equal": False, "error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
