"""What a diagnostic prints: legend, tables and verdict, for readers who have not seen its code."""

from typing import Any

from rich.table import Table
from rich.text import Text

from dgd_lightning.analysis.diagnosis import ALL, MAIN, Cell, Diagnosis
from dgd_lightning.metrics.clustered import counted, shown
from dgd_lightning.metrics.diagnosis import ADAPTED, DRAFT, PERCENT, RANDOM, SHUFFLED, TARGET, Wins
from dgd_lightning.report.print_tables import new_table

LEGEND = """\
Every reader is shown the prompt and the gold answer up to a token, and must place the token that comes next.
  top-1 token   share of tokens that it places first
  median, mean   rank of the right token, 1 is best (mean: geometric; equal logits share their ranks' mean)
  net            share of tokens that it places better than the other reader, less the share that it places worse;
                 in brackets the 95% interval over whole contexts; above 0: it knows better
RANK DECIDES. Probability is shown beside it and must not decide: where the target is unsure and wrong, any flat
distribution gives the right token more than the target does, without knowing anything. How much of that there is,
the line of random features shows: the same draft, fed with noise."""


def report(found: Diagnosis, *, whole: bool) -> list[Table | Text]:
    """Legend, tables and verdict; one table and the verdict where not the whole is wanted."""
    unsure = found.buckets[0]
    parts: list[Any] = [_about(found)]
    if whole:
        title = f"Where the target is unsure (its top-1 token {unsure}): these tokens decide"
        parts += [Text(LEGEND), reader_table(found, unsure, title), reader_table(found, ALL, "All answer tokens")]
    parts.append(bucket_table(found))
    if whole and found.further:
        parts.append(further_table(found))
    parts += [Text(one.text) for one in found.verdicts]
    return [piece for part in parts for piece in (part, Text())]


def _about(found: Diagnosis) -> Text:
    answers, tokens = counted(found.tasks, "gold answer"), counted(len(found.bucket), "token")
    what = [f"{answers} of {counted(found.contexts, 'context')}, {tokens}"]
    if found.kept is not None:
        what.append(f"adapters kept for {found.kept} of them (elsewhere the adapted draft is the draft)")
    if found.skipped:
        what.append(f"{counted(found.skipped, 'task')} skipped, too long")
    return Text("; ".join(what) + ".")


def reader_table(found: Diagnosis, bucket: str, title: str) -> Table:
    """Every reader on the tokens of a bucket."""
    ranks = ("rank: net against\nthe target", "rank: net against\nrandom features")
    chances = ("p mean", "p: net against target\n(does not decide)")
    table = new_table(title, ["reader"], ("tokens", "top-1\ntoken", "median", "mean", *ranks, *chances))
    for column in table.columns:
        column.no_wrap = "net against" in str(column.header)
    cells = found.cells[bucket]
    groups = [[TARGET, DRAFT, ADAPTED], [SHUFFLED, RANDOM], found.group("slot"), found.group("layer"), found.further]
    for group in groups:
        for name in group:
            if name in cells:
                cell, place = cells[name], cells[name].placement
                table.add_row(
                    _label(name),
                    f"{place.tokens:,}",
                    shown(place.top_1, "{:.1%}"),
                    shown(place.median_rank, "{:g}"),
                    shown(place.mean_rank, "{:.1f}"),
                    net(cell.rank),
                    net(cell.control),
                    shown(place.probability, "{:.3f}"),
                    net(cell.probability),
                )
        table.add_section()
    return table


def _label(name: str) -> str:
    return f"{name} (slot 1)" if name == DRAFT else name


def bucket_table(found: Diagnosis) -> Table:
    """The main readers over the target's confidence."""
    counts = {name: found.cells[name][TARGET].placement.tokens for name in (*found.buckets, ALL)}
    title = "By the target's confidence: top-1 token, and net rank against the target"
    table = new_table(title, ["reader"], (f"{name}\n{count:,} tokens" for name, count in counts.items()))
    for reader in (TARGET, *MAIN):
        if reader in found.cells[ALL]:
            table.add_row(_label(reader), *(_short(found.cells[name][reader]) for name in counts))
    return table


def _short(cell: Cell) -> str:
    first = shown(cell.placement.top_1, "{:.1%}")
    return first if cell.rank is None or not cell.placement.tokens else f"{first}\n{net(cell.rank)}"


def further_table(found: Diagnosis) -> Table:
    """Readers that the user added, against the draft as it is."""
    where = (ALL, f"target {found.buckets[0]}")
    columns = (f"{what}\n{tokens}" for tokens in where for what in ("top-1 token", "net against the draft"))
    table = new_table("Further readers against the draft as it is, by rank", ["reader"], columns)
    for reader in (DRAFT, *found.further):
        cells = [found.cells[name][reader] for name in (ALL, found.buckets[0])]
        texts = ((shown(cell.placement.top_1, "{:.1%}"), net(cell.draft)) for cell in cells)
        table.add_row(_label(reader), *(text for pair in texts for text in pair))
    return table


def net(won: Wins | None) -> str:
    """``+12% [+8, +16]``, or a dash where there is nothing to compare."""
    return "–" if won is None or not won.tokens else won.net.text(PERCENT)
