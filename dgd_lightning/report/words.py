"""What a data set calls what is measured: CL-bench solves tasks of contexts, GSM8K and HumanEval have problems."""

from collections.abc import Sequence
from typing import NamedTuple

from dgd_lightning.metrics.clustered import counted
from dgd_lightning.scoring.graded import Graded


class Words(NamedTuple):
    """For tables, pictures, tags of TensorBoard and sentences."""

    measure: str = "Solve rate"
    how: str = ""  # what has to be so for an answer to count, before a semicolon
    task: str = "task"
    unit: str = "context"  # what intervals are over

    @property
    def tasks(self) -> str:
        """Plural."""
        return f"{self.task}s"

    @property
    def over(self) -> str:
        """Of an interval."""
        return f"95% intervals over {self.unit}s"

    @property
    def every(self) -> str:
        """The column, and the tag, of all of them."""
        return f"all {self.tasks}"

    @property
    def tag(self) -> str:
        """In TensorBoard."""
        return self.measure.lower().replace(" ", "_")

    @property
    def column(self) -> str:
        """In the table of a run."""
        return "solved" if self.measure == "Solve rate" else self.measure.lower()

    def counted(self, number: int) -> str:
        """``8 contexts``."""
        return counted(number, self.unit)


WORDS = Words()
GRADED = tuple(words.column for words in (WORDS, Words("Accuracy")))  # columns that only grading fills


def words_of(scores: Sequence[Graded]) -> Words:
    """The words for these answers: of rows with rubrics CL-bench's, of results and programs that are checked theirs.

    What has no context is a problem of its own, over which intervals are.
    """
    checked = {one.grader for one in scores if one.score is not None}
    if any(one.satisfied[1] for one in scores):
        return Words(how="all rubrics hold; ")
    if not checked or not checked <= {"math", "code"}:
        return WORDS
    how = "pass@1; " if checked == {"code"} else ""
    return Words("Accuracy", how, *(("problem", "problem") if all(one.alone for one in scores) else ()))
