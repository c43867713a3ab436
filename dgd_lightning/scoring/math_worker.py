"""Stand-alone program: compares two results with math-verify, one JSON line in, one out, until stdin ends.

It may hang or eat memory on hostile input. Processor time of a comparison is limited by a timer whose signal nobody
handles, so the kernel ends this process, whatever it is busy with; `math_grader.py` starts another. Only LaTeX is
parsed, by a grammar; math-verify's plain expressions go through ``eval`` and are never used.
"""

import io
import json
import logging
import resource
import signal
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
