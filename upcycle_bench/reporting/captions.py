"""Sentences about a board: what its runs have in common, what its numbers are, and how to read all boards.

print(heading(board), *verdicts(board), *caption(board), *NOTES, sep="\n")
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from upcycle_bench.record import TUNED
from upcycle_bench.reporting.board import GUEST, Board, Row
from upcycle_bench.reporting.columns import shown_scores, split_column, targets_of, versus
from upcycle_bench.reporting.equal_compute import LONGER, NEAR

LOG_RANK = "log_rank"  # as `evaluation.ranking` calls it
RESOLVED = ("better", "worse")  # only these verdicts are bold
VERDICTS = {verdict: verdict for verdict in (*RESOLVED, "tied", "undecided", "no reference")} | {
    "not yet ranked": "not yet ranked (fewer than three training seeds)"
}
NAMED, LETTERS = 6, 40  # rows of one verdict by name, above the table; letters of a name there
NOTES = (
    "± is the half width of a 95 % Student-t confidence interval over n training seeds (several initialisations of one "
    "training seed are averaged first) and, where the records have outcomes, evaluation samples. Over few seeds such "
    "an interval is wide; over one (n=1) there is none.",
    "Verdicts are about the difference to the reference: better or worse where p < 0.05 (Holm's, over the strategies "
    "of the table, for each score alone), tied where the interval is within one run's standard deviation over seeds, "
    "else undecided. With fewer than three seeds a strategy is not ranked: it has no # (-), and its row stands where "
    "its mean does. # is the place of the mean among the ranked ones.",
    "In parentheses behind other metrics: the standard error over evaluation samples, where the records have it.",
    "Differences are paired by initialisation and training seed; their n counts the training seeds with a pair.",
    "Charged FLOPs: all phases before evaluation, and of a tuned row all runs of its tuning. Times and FLOPs are means "
    "per run.",
)


def heading(board: Board) -> str:
    """What the runs of this board have in common."""
    suites = "".join(f", {suite} {fingerprint[:8]}" for suite, fingerprint in board.suite_fingerprints.items())
    against = f", against {board.baseline} of as much compute" if board.view == "compute" else ""
    where = f"training {board.training_fingerprint[:8]}{suites}, dense {board.dense[:8]}"
    return f"{board.protocol}, {board.division} division{against} ({where})"


def verdicts(board: Board) -> list[str]:
    """A sentence for each headline score: which rows are better than the reference, worse, tied and so on."""
    sentences = []
    for name in board.headlines if board.baseline else ():
        found = [(row.label, headline.verdict) for row in board.rows if (headline := row.headlines.get(name))]
        groups = {verdict: [label for label, mine in found if mine == verdict] for verdict in VERDICTS}
        said = [f"{VERDICTS[verdict]}: {_named(mine)}" for verdict, mine in groups.items() if mine]
        against = versus(board).removeprefix("vs ")
        sentences.append(f"{name}, against {against}: {'; '.join(said) or 'no other row'}.")
    return sentences


def _named(labels: Sequence[str]) -> str:
    """The first labels, and how many more there are."""
    more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
    return ", ".join(each if len(each) <= LETTERS else each[: LETTERS - 1] + "…" for each in labels[:NAMED]) + more


def caption(board: Board, whole: bool = True) -> list[str]:
    """Sentences about the numbers of this board, of all columns or not; NOTES are about those of all boards."""
    sentences = []
    if board.division == "open":
        overrides = " ".join(f"--set {override}" for override in board.overrides)
        options = "options off the protocol's defaults." if any(_off_defaults(row) for row in board.rows) else ""
        what = "; ".join(filter(None, [overrides, board.unequal, options])) or "random data."
        sentences.append(f"Open division, not to be compared with other tables: {what}")
    if any(row.guest for row in board.rows):
        sentences.append(f"Rows marked {GUEST} ran and were scored alike; here they are what the others compare with.")
    for name, headline in board.headlines.items():
        direction = f"{'higher' if headline.higher_is_better else 'lower'} is better"
        chance = "" if headline.chance is None else f", chance is {headline.chance:.4f}"
        sentences.append(f"{name}: mean of {_parts(headline.parts)}; {direction}{chance}.")
    if len(board.headlines) > 1:
        sentences.append(f"Ranks are by {next(iter(board.headlines))}; the headline scores are never mixed.")
    if any(
        split_column(part)[2].endswith(LOG_RANK) for headline in board.headlines.values() for part in headline.parts
    ):
        sentences.append("log_rank: mean ln(1 + wrong answers nearer than the right one); e to it is a geometric mean.")
    sentences += _equal_compute(board) if board.view == "compute" else []
    if board.baseline and board.view == "steps":
        sentences.append(f"vs {board.baseline}: the score minus that of {board.baseline}.")
    if targets := targets_of(board) if whole else []:
        sentences.append(
            f"to {', '.join(targets)}: steps until the held-out curve, a mean over the seeds that both have, is where "
            "the reference's ends, and charged FLOPs until then by those that the reference itself needed."
        )
    if alone := [name for name in board.headlines if name not in board.over_samples]:
        sentences.append(
            f"Intervals of {', '.join(alone)} are over training seeds alone: not all runs have outcomes of each sample."
        )
    every = [(name, each.standard_error) for row in board.rows for name, each in row.headlines.items()]
    errors = [(name, error) for name, error in every if error is not None]
    if errors:
        names = [name for name in board.headlines if name in dict(errors)]
        most = ", ".join(f"{name} {max(error for other, error in errors if other == name):.4f}" for name in names)
        sentences.append(
            f"Over evaluation samples the standard error is at most: {most}; rows share the samples, so their "
            "differences are surer."
        )
    scored = {name for row in board.rows for name in row.scores}
    parts = [part for headline in board.headlines.values() for part in headline.parts]
    shown = {split_column(name)[0] for name in (*shown_scores(scored, board), *parts)}
    if scored and (hidden := sorted(board.suite_fingerprints.keys() - shown)):
        sentences.append(
            f"No column here for {', '.join(hidden)}: scores are in csv and json, all they say in the records."
        )
    runs = sum(row.runs for row in board.rows)
    if without := runs - sum(row.certified for row in board.rows):
        sentences.append(
            f"There are {without} of {runs} runs without a certificate of their evaluation (docs/protocols.md)."
        )
    return sentences


def _off_defaults(row: Row) -> bool:
    """Whether somebody set options of this row."""
    return not row.guest and row.label not in (row.strategy, f"{row.strategy}{TUNED}")


def _equal_compute(board: Board) -> list[str]:
    """What each row is compared with, and what has to be run where there is nothing."""
    ratios = dict(zip((row.label for row in board.rows), board.flops_ratios, strict=True))
    sentences = [
        f"Equal compute: a row that cost at most {NEAR:.0%} more than {board.baseline} is compared with it, another "
        f"one with a run of its kind whose charged FLOPs are within {NEAR:.0%} of its own; nothing is ranked."
    ]
    usual = next((each.charged_flops for each in board.rows if each.label == "sparse-upcycling"), None)
    missing, commands = list[str](), list[str]()
    for row in board.rows:
        ratio, other = ratios[row.label], ratios.get(row.peer or "")
        if row.peer not in (None, board.baseline, row.label) and other is not None:
            sentences.append(f"{row.label} ({ratio:.2f}x) is compared with {row.peer} ({other:.2f}x).")
        elif row.peer is None and ratio is not None and row.headlines:
            missing.append(f"{row.label} ({ratio:.2f}x)")
            if usual and row.charged_flops:
                commands.append(_longer(board, row.charged_flops / usual))
    if missing:
        sentences.append(f"Nothing cost as much yet as {', '.join(missing)}.")
    if commands:
        sentences.append(f"What is missing: {'; '.join(dict.fromkeys(commands))}")
    return sentences


def _longer(board: Board, compute: float) -> str:
    """The command that trains the reference for that multiple of sparse upcycling's FLOPs."""
    same = board.baseline == "dense" and abs(compute - 1) <= NEAR
    what = "dense-longer" if same else f"{LONGER[board.baseline or '']} -o compute={compute:.2f}"
    seeds = max(row.seeds for row in board.rows)
    return f"upcycle-bench run -s {what} -p {board.protocol} --seeds {seeds}"


def _parts(columns: tuple[str, ...]) -> str:
    """Up to four scores by name; more of them grouped by suite and metric."""
    if len(columns) <= 4:
        return ", ".join(columns)
    suites: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for column in columns:
        suite, dataset, metric = split_column(column)
        suites[suite][metric].append(dataset)
    groups = [
        f"{suite} " + "; ".join(f"{metric} on {', '.join(datasets)}" for metric, datasets in sorted(metrics.items()))
        for suite, metrics in suites.items()
    ]
    return f"{len(columns)} scores ({'; '.join(groups)})"
