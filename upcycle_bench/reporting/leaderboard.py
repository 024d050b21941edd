"""From records to leaderboards, one for each set of runs that may be compared. `formats.render` writes them.

    boards = build([read(path) for path in record_paths(folder)])
    print(render(boards, "terminal"))        # or "md", "csv", "json"

Runs have one headline score or several, which are never mixed. A row has each as a mean over training seeds, with
Student's t interval; n counts training seeds. Rows are ranked by the first headline score. Initialisations of
one training seed depend on each other, so they are averaged first. Standard errors over evaluation samples are separate
columns, since all runs share the samples; a row has the mean of the errors of its runs.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upcycle_bench.record import Record, ScoreRecord
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError

BASELINES = ("sparse-upcycling", "dense")  # differences are to the first of these with a successful run

SeedPair = tuple[int, int]  # seeds of initialisation and of training


@dataclass(frozen=True)
class SeedMean:
    """A mean over `n` training seeds and the half width of its 95 % confidence interval (None for one seed)."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class RowHeadline:
    """A headline score of a row, its difference to the baseline's, paired by both seeds, and an upper bound of its
    standard error over evaluation samples.
    """

    mean: SeedMean
    difference: SeedMean | None
    standard_error: float | None


@dataclass(frozen=True)
class BoardHeadline:
    """A headline score of a board: the scores whose mean it is, its direction, and the value of guessing."""

    parts: tuple[str, ...]
    higher_is_better: bool
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy label: means over the runs that count, which are the newest successes of each pair of seeds.

    Values are None where no run succeeded. FLOPs and seconds are means per run.
    """

    rank: int | None
    label: str
    strategy: str
    kind: str  # the row's mark: reconstructed, parts reconstructed, control, unpublished; "": published
    headlines: dict[str, RowHeadline]  # empty where no run succeeded
    scores: dict[str, float]  # suite/dataset/metric -> mean
    standard_errors: dict[str, float]  # over evaluation samples, of the scores where all runs have one
    parameters_total: int | None
    parameters_active: int | None
    train_seconds: float | None
    train_flops: float | None
    charged_flops: float | None  # of every phase before evaluation
    tokens_dropped: float | None
    runs: int  # how many count
    certified: int  # how many of these have a certificate
    failed: int
    superseded: int
    mixed: bool  # the runs that count differ in configuration, plugin version or code
    dirty: int  # how many of them ran with changes that no commit has
    status: str  # "ok" where a run succeeded, else the status of the newest run
    reason: str | None

    @property
    def title(self) -> str:
        """The label with its mark."""
        return f"{self.label} ({self.kind})" if self.kind else self.label

    @property
    def seeds(self) -> int:
        """How many training seeds count."""
        return max((headline.mean.n for headline in self.headlines.values()), default=0)

    @property
    def outcome(self) -> str:
        """How the runs ended, in words."""
        failed = [f"{self.failed} failed"] if self.failed else []
        if not self.headlines:
            reason = textwrap.shorten(self.reason or "", 80, placeholder=" ...")
            return f"{self.status}: {reason}" + (f" ({failed[0]})" if self.failed > 1 else "")
        superseded = [f"{self.superseded} superseded"] if self.superseded else []
        mixed = ["mixes configurations, versions or code"] if self.mixed else []
        dirty = [f"{self.dirty} of a dirty tree"] if self.dirty else []
        return ", ".join(["ok", *failed, *superseded, *mixed, *dirty])


@dataclass(frozen=True, kw_only=True)
class Board:
    """Runs with equal protocol, division, fingerprints and dense model."""

    protocol: str
    division: str
    overrides: tuple[str, ...]
    unequal: str | None
    training_fingerprint: str
    suite_fingerprints: dict[str, str]
    dense: str
    headlines: dict[str, BoardHeadline]
    baseline: str | None
    rows: tuple[Row, ...]


def build(records: list[Record]) -> list[Board]:
    """One board for each set of comparable records, sorted by protocol, closed division first. UserError if empty."""
    if not records:
        raise UserError("a leaderboard needs records: there are none.")
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.created_at, r.run_id)):  # the last of every list is the newest
        protocol = record.protocol
        suites = tuple(sorted(protocol.suite_fingerprints.items()))
        key = (protocol.name, protocol.division, protocol.training_fingerprint, suites, record.hashes.dense)
        groups[key].append(record)
    return [_board(groups[key]) for key in sorted(groups)]


def seed_mean(by_training_seed: Mapping[int, list[float]]) -> SeedMean:
    """Mean and Student-t interval over training seeds; `by_training_seed`: seed -> the values of its runs."""
    values = [statistics.fmean(of_one_seed) for of_one_seed in by_training_seed.values()]
    n = len(values)
    if n == 1:
        return SeedMean(values[0], None, 1)
    from scipy.special import stdtrit  # quantile of Student's t

    half_width = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return SeedMean(statistics.fmean(values), half_width, n)


def _board(records: list[Record]) -> Board:
    """The board of these records, which come oldest first."""
    by_label: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_label[record.strategy.label].append(record)
    # Of several successes with the same seeds, the newest counts.
    counting = {
        label: {(run.seeds.init, run.seeds.train): run for run in runs if run.status == "ok"}
        for label, runs in by_label.items()
    }
    baseline = next((label for label in BASELINES if counting.get(label)), None)
    rows = [
        _row(runs, counting[label], counting[baseline] if baseline and label != baseline else {})
        for label, runs in by_label.items()
    ]
    headlines = _headlines([run for runs in counting.values() for run in runs.values()])
    first = next(iter(headlines), "")
    sign = -1 if first and headlines[first].higher_is_better else 1

    def place(row: Row) -> tuple[bool, float, str]:
        known = row.headlines.get(first)
        return known is None, sign * known.mean.mean if known else 0.0, row.label

    rows.sort(key=place)
    newest = records[-1]
    return Board(
        protocol=newest.protocol.name,
        division=newest.protocol.division,
        overrides=newest.protocol.overrides,
        unequal=newest.protocol.unequal,
        training_fingerprint=newest.protocol.training_fingerprint,
        suite_fingerprints=dict(sorted(newest.protocol.suite_fingerprints.items())),
        dense=newest.hashes.dense,
        headlines=headlines,
        baseline=baseline,
        rows=tuple(
            replace(row, rank=rank) if first in row.headlines else row for rank, row in enumerate(rows, start=1)
        ),
    )


def _headlines(runs: Sequence[Record]) -> dict[str, BoardHeadline]:
    """The headline scores of these runs, whose suites are equal."""
    found = {}
    for run in runs:
        for name, headline in run.headlines.items():
            parts = tuple(sorted(_column(score) for score in run.scores if score.headline == name))
            found[name] = BoardHeadline(parts, headline.higher_is_better, headline.chance)
    return found


def _row(runs: list[Record], counting: dict[SeedPair, Record], base: dict[SeedPair, Record]) -> Row:
    """The row of one label. `runs`: all of it, oldest first; `counting`: those that count; `base`: the baseline's."""
    headlines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    differences: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    scores: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[str, list[float | None]] = defaultdict(list)
    for seeds, run in sorted(counting.items()):
        for name, headline in run.headlines.items():
            headlines[name][seeds[1]].append(headline.value)
            if seeds in base and name in base[seeds].headlines:
                differences[name][seeds[1]].append(headline.value - base[seeds].headlines[name].value)
        for score in run.scores:
            scores[_column(score)][seeds[1]].append(score.value)
            errors[_column(score)].append(score.standard_error)
    failures = [run for run in runs if run.status != "ok"]
    newest = runs[-1]
    sources = {strict_json.dumps(run.strategy.model_dump(mode="json"), sort_keys=True) for run in counting.values()}
    costs = [run.cost for run in counting.values() if run.cost]
    return Row(
        rank=None,
        label=newest.strategy.label,
        strategy=newest.strategy.name,
        kind=newest.strategy.mark,
        headlines={
            name: RowHeadline(
                seed_mean(values),
                seed_mean(differences[name]) if name in differences else None,
                _mean(known.standard_error for run in counting.values() if (known := run.headlines.get(name))),
            )
            for name, values in headlines.items()
        },
        scores={name: seed_mean(values).mean for name, values in sorted(scores.items())},
        standard_errors={name: mean for name, each in sorted(errors.items()) if (mean := _mean(each)) is not None},
        parameters_total=costs[0].parameters_total if costs else None,
        parameters_active=costs[0].parameters_active if costs else None,
        train_seconds=_mean(cost.phases["train"].seconds if "train" in cost.phases else 0 for cost in costs),
        train_flops=_mean(cost.phases["train"].flops if "train" in cost.phases else 0 for cost in costs),
        charged_flops=_mean(
            _sum(phase.flops for name, phase in cost.phases.items() if name != "evaluate") for cost in costs
        ),
        tokens_dropped=_mean(cost.tokens_dropped for cost in costs),
        runs=len(counting),
        certified=sum(run.certificate is not None for run in counting.values()),
        failed=len(failures),
        superseded=len(runs) - len(failures) - len(counting),
        mixed=len(sources) > 1,
        dirty=sum(map(_dirty, counting.values())),
        status="ok" if counting else newest.status,
        reason=None if counting else newest.reason,
    )


def _dirty(record: Record) -> bool:
    """Whether the code that trained or scored the run had changes that no commit has."""
    training = record.environment.get("training")
    trained = training.get("environment") if isinstance(training, dict) else None
    trees = [each.get("git") for each in (record.environment, trained) if isinstance(each, dict)]
    return any(isinstance(git, dict) and git.get("dirty") is True for git in trees)


def _column(score: ScoreRecord) -> str:
    return f"{score.suite}/{score.dataset}/{score.metric}"


def _sum(values: Iterable[int | None]) -> int | None:
    """The sum; None if any value is unknown, since the sum of the others would look too cheap."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None if any value is unknown, and without values."""
    known = list(values)
    return statistics.fmean(value for value in known if value is not None) if known and None not in known else None
