"""From records to leaderboards, one for each set of runs that may be compared. `formats.render` writes them.

    boards = build([read(path) for path in record_paths(folder)], outcomes)
    print(render(boards, "terminal"))        # or "md", "csv", "json"

Runs have one headline score or several, which are never mixed. A row has each as a mean over training seeds, with an
interval over seeds and evaluation samples (`standings`); n counts training seeds. Rows are ranked by the first headline
score. Initialisations of one training seed depend on each other, so they are averaged first.
"""

from __future__ import annotations

import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from upcycle_bench.record import Record, ScoreRecord
from upcycle_bench.reporting.comparable import SeedPair, Table, counting_runs, with_closed
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:  # they import numpy
    from upcycle_bench.reporting.resampling import Sure
    from upcycle_bench.reporting.standings import Outcomes, Standing

GUEST = "closed division"  # what marks its rows in a table of the open one
BASELINES = ("sparse-upcycling", "dense")  # differences are to the first of these with a successful run


@dataclass(frozen=True)
class SeedMean:
    """A mean over `n` training seeds and the half width of its 95 % confidence interval (None for one seed)."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class RowHeadline:
    """A headline score of a row, and how it stands to the others' (`standings.Standing`).

    difference: to the baseline's, paired by both seeds; p: of it, by Holm over the table. standard_error: an upper
    bound of one run's, over evaluation samples. of_init, of_train: standard deviations over seeds of each kind.
    spread: that of paired differences over training seeds; samples: their standard error over evaluation samples.
    """

    mean: SeedMean
    difference: SeedMean | None
    standard_error: float | None
    p: float | None
    verdict: str
    ranks: tuple[int, int] | None
    letters: str
    of_init: float | None
    of_train: float | None
    spread: float | None
    samples: float | None


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
    guest: bool  # of the closed division, in a table of the open one
    headlines: dict[str, RowHeadline]  # empty where no run succeeded
    scores: dict[str, float]  # suite/dataset/metric -> mean
    standard_errors: dict[str, float]  # over evaluation samples, of the scores where all runs have one
    parameters_total: int | None
    parameters_active: int | None
    train_seconds: float | None
    train_flops: float | None
    charged_flops: float | None  # of every phase before evaluation, and of all that tuned the row
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
        return self._marked(self.kind)

    @property
    def short_title(self) -> str:
        """The same with the first part of the mark."""
        return self._marked(self.kind.partition(";")[0])

    def _marked(self, mark: str) -> str:
        marks = "; ".join(filter(None, [mark, GUEST if self.guest else ""]))
        return f"{self.label} ({marks})" if marks else self.label

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
    over_samples: tuple[str, ...]  # headline scores whose intervals are over evaluation samples, too
    baseline: str | None
    rows: tuple[Row, ...]

    @property
    def table(self) -> Table:
        """`comparable.table_of` its records."""
        suites = tuple(self.suite_fingerprints.items())
        return self.protocol, self.division, self.training_fingerprint, suites, self.dense

    @property
    def flops_ratios(self) -> list[float | None]:
        """Each row's charged FLOPs by the baseline's; None where one of them is unknown or the baseline has none."""
        base = next((row.charged_flops for row in self.rows if row.label == self.baseline), None)
        return [None if row.charged_flops is None or not base else row.charged_flops / base for row in self.rows]


def no_outcomes(record: Record) -> Mapping[str, Any]:
    """Of records without their files."""
    del record
    return {}


def build(records: list[Record], outcomes: Outcomes = no_outcomes) -> list[Board]:
    """One board for each set of comparable records, sorted by protocol, closed division first. UserError if empty.

    `outcomes` gives those of each sample, by suite/dataset/name, so that intervals are over samples, too.
    """
    if not records:
        raise UserError("a leaderboard needs records: there are none.")
    return [_board(runs, closed, outcomes) for runs, closed in with_closed(records)]


def _shown(sure: Sure) -> SeedMean:
    return SeedMean(sure.mean, sure.half_width, sure.seeds)


def _board(own: list[Record], closed: list[Record], outcomes: Outcomes) -> Board:
    """The board of these records, which come oldest first. `closed`: of an open board, those to compare with."""
    from upcycle_bench.reporting.standings import stand

    by_label: dict[str, list[Record]] = defaultdict(list)
    for record in (records := [*own, *closed]):
        by_label[record.strategy.label].append(record)
    counting = counting_runs(records)
    baseline = next((label for label in BASELINES if counting.get(label)), None)
    headlines = _headlines([run for runs in counting.values() for run in runs.values()])
    standings = {
        name: stand(counting, name, higher_is_better=each.higher_is_better, reference=baseline, outcomes=outcomes)
        for name, each in headlines.items()
    }
    rows = [
        _row(
            runs,
            counting[label],
            {name: each[label] for name, each in standings.items() if label in each},
            guest=runs[0].division != own[0].division,
        )
        for label, runs in by_label.items()
    ]
    first = next(iter(headlines), "")
    sign = -1 if first and headlines[first].higher_is_better else 1

    def place(row: Row) -> tuple[bool, float, str]:
        known = row.headlines.get(first)
        return known is None, sign * known.mean.mean if known else 0.0, row.label

    rows.sort(key=place)
    newest = own[-1]
    return Board(
        protocol=newest.protocol.name,
        division=newest.division,
        overrides=newest.protocol.overrides,
        unequal=newest.protocol.unequal,
        training_fingerprint=newest.protocol.training_fingerprint,
        suite_fingerprints=dict(sorted(newest.protocol.suite_fingerprints.items())),
        dense=newest.hashes.dense,
        headlines=headlines,
        over_samples=tuple(name for name, each in standings.items() if any(s.score.of_samples for s in each.values())),
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


def _row(runs: list[Record], counting: dict[SeedPair, Record], standings: Mapping[str, Standing], guest: bool) -> Row:
    """The row of one label. `runs`: all of it, oldest first; `counting`: those that count."""
    scores: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[str, list[float | None]] = defaultdict(list)
    for seeds, run in sorted(counting.items()):
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
        guest=guest,
        headlines={
            name: RowHeadline(
                mean=_shown(standing.score),
                difference=None if standing.difference is None else _shown(standing.difference),
                standard_error=_mean(
                    known.standard_error for run in counting.values() if (known := run.headlines.get(name))
                ),
                p=standing.p,
                verdict=standing.verdict,
                ranks=standing.ranks,
                letters=standing.letters,
                of_init=standing.of_init,
                of_train=standing.of_train,
                spread=standing.difference.spread if standing.difference else None,
                samples=standing.difference.of_samples if standing.difference else None,
            )
            for name, standing in standings.items()
        },
        scores={name: _mean_of_means(values) for name, values in sorted(scores.items())},
        standard_errors={name: mean for name, each in sorted(errors.items()) if (mean := _mean(each)) is not None},
        parameters_total=costs[0].parameters_total if costs else None,
        parameters_active=costs[0].parameters_active if costs else None,
        train_seconds=_mean(cost.phases["train"].seconds if "train" in cost.phases else 0 for cost in costs),
        train_flops=_mean(cost.phases["train"].flops if "train" in cost.phases else 0 for cost in costs),
        charged_flops=_mean(run.charged_flops for run in counting.values()),
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


def _mean_of_means(by_training_seed: Mapping[int, list[float]]) -> float:
    return statistics.fmean(statistics.fmean(values) for values in by_training_seed.values())


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None if any value is unknown, and without values."""
    known = list(values)
    return statistics.fmean(value for value in known if value is not None) if known and None not in known else None
