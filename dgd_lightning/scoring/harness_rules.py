"""What lm-evaluation-harness says of an answer to a GSM8K question, by its two filters; our own score is another.

Source: version 0.4.13, ``tasks/gsm8k/gsm8k.yaml`` (patterns, ``group_select``, ``regexes_to_ignore``),
``filters/extraction.py`` and ``exact_match`` in ``api/metrics.py``. While it decodes, the harness ends an answer at
"Question:", "</s>" or "<|im_end|>"; here an answer is read as it was written, text behind these included.
"""

import re

FILTERS = ("strict-match", "flexible-extract")
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?(?:[$0-9.,]{2,}|[0-9])")
NOT_COMPARED = re.compile(r".*#### |[,$]", re.S)


def harness_verdicts(answer: str, gold: str) -> dict[str, int]:
    """1 or 0 by the name of each filter: ``strict-match`` takes the first "#### " with a number, ``flexible-extract``
    the last number; equal are texts, not values: 18.0 is not 18.

    Args:
        answer: what the model wrote.
        gold: the row's ``answer``, its reasoning included.
    """
    strict, flexible = STRICT.search(answer), FLEXIBLE.findall(answer)
    found = (strict[1] if strict else "", flexible[-1] if flexible else "")
    return {name: int(_compared(text) == _compared(gold)) for name, text in zip(FILTERS, found, strict=True)}


def _compared(text: str) -> str:
    """Without dollar signs, commas and one full stop at the end, behind the last "#### "."""
    return re.sub(r"\.$", "", NOT_COMPARED.sub("", text)).lower()
