"""From records to leaderboards, one for each set of runs that may be compared. `formats.render` writes them.

    boards = build([read(path) for path in record_paths(folder)], outcomes)
    print(render(boards, "terminal"))        # or "md", "csv", "json"

Runs have one headline score or several, which are never mixed. A row has each as a mean over training seeds, with an
interval over seeds and evaluation samples (`standings`); n counts training seeds. Rows stand in the order of the first
headline score; those with enough seeds are ranked by it. Initialisations of one training seed depend on each other, so
they are averaged first.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upcycle_bench.record import Record, ScoreRecord
from upcycle_bench.reporting.board import Board, BoardHeadline, Row, RowHeadline, SeedMean
from upcycle_bench.reporting.comparable import VIEWS, SeedPair, counting_runs, with_closed
from upcycle_bench.reporting.equal_compute import KINDS, any_of, peers_of
from upcycle_bench.reporting.targets import targets_of
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:  # they import numpy
    from upcycle_bench.reporting.drawn import Outcomes
    from upcycle_bench.reporting.resampling import Sure
    from upcycle_bench.reporting.standings import Standing

BASELINES = ("sparse-upcycling", "dense")  # differences are to the first of these with a successful run


def no_outcomes(record: Record) -> Mapping[str, Any]:
    """Of records without their files."""
    del record
    return {}


def build(records: list[Record], outcomes: Outcomes = no_outcomes, view: str = "steps") -> list[Board]:
    """One board for each set of comparable records, sorted by protocol, closed division first. UserError if empty.

    `view`: "compute" gives one for each kind of reference, against runs of as much compute (`equal_compute`).
    `outcomes` gives those of each sample, by suite/dataset/name, so that intervals are over samples, too.
    """
    if not records:
        raise UserError("a leaderboard needs records: there are none.")
    groups = with_closed(records, VIEWS[view])
    if view == "steps":
        return [_board(runs, closed, outcomes) for runs, closed in groups]
    boards = [_board(runs, [], outcomes, kind) for runs, _ in groups for kind in KINDS if any_of(kind, runs)]
    if not boards:
        raise UserError(f"a view of equal compute needs runs of {' or '.join(KINDS)}: there are none.")
    return boards


def _shown(sure: Sure) -> SeedMean:
    return SeedMean(sure.mean, sure.half_width, sure.seeds)


def _board(own: list[Record], closed: list[Record], outcomes: Outcomes, kind: str | None = None) -> Board:
    """The board of these records, which come oldest first; against runs of that `kind` of as much compute.

    closed: of an open board, those of the closed division to compare with.
    """
    from upcycle_bench.reporting.standings import stand

    by_label: dict[str, list[Record]] = defaultdict(list)
    guests = {record.strategy.label for record in closed}
    for record in (records := [*own, *closed]):
        by_label[record.strategy.label].append(record)
    counting = counting_runs(records)
    baseline = kind or next((label for label in BASELINES if counting.get(label)), None)
    peers = dict.fromkeys(counting, baseline) if kind is None else peers_of(counting, kind)
    reference = {label: peer for label, peer in peers.items() if peer is not None}
    headlines = _headlines([run for runs in counting.values() for run in runs.values()])
    standings = {
        name: stand(counting, name, higher_is_better=each.higher_is_better, reference=reference, outcomes=outcomes)
        for name, each in headlines.items()
    }
    if kind is not None:  # runs of another compute have no ranks in common
        standings = {
            name: {k: replace(s, ranks=None, letters="") for k, s in each.items()} for name, each in standings.items()
        }
    rows = [
        replace(
            _row(runs, counting[label], {name: each[label] for name, each in standings.items() if label in each}),
            guest=label in guests,
            targets=targets_of(counting, label),
            peer=peers[label],
        )
        for label, runs in by_label.items()
    ]
    first = next(iter(headlines), "")
    sign = -1 if first and headlines[first].higher_is_better else 1

    def place(row: Row) -> tuple[bool, float, str]:
        known = row.headlines.get(first)
        return known is None, sign * known.mean.mean if known else 0.0, row.label

    rows.sort(key=place)
    newest = next((record for record in reversed(own) if not record.protocol.unequal), own[-1])
    return Board(
        view="steps" if kind is None else "compute",
        protocol=newest.protocol.name,
        division=newest.division,
        overrides=tuple(dict.fromkeys(override for run in own for override in run.protocol.overrides)),
        # At equal compute, another one is no reason for a table of its own.
        unequal="; ".join(_reasons(own)) or None if kind is None else None,
        training_fingerprint=newest.protocol.training_fingerprint,
        suite_fingerprints=dict(sorted(newest.protocol.suite_fingerprints.items())),
        dense=newest.hashes.dense,
        headlines=headlines,
        over_samples=tuple(name for name, each in standings.items() if any(s.score.of_samples for s in each.values())),
        baseline=baseline,
        rows=_ranked(rows, first),
    )


def _reasons(runs: Sequence[Record]) -> list[str]:
    """Why these runs do not cost what the protocol's MoE does, each reason once."""
    return list(dict.fromkeys(run.protocol.unequal for run in runs if run.protocol.unequal))


def _ranked(rows: Sequence[Row], headline: str) -> tuple[Row, ...]:
    """The rows, of which those that are ranked have their place among these. Others keep their place in the order."""
    places = itertools.count(1)
    ranked = [headline in row.headlines and row.headlines[headline].ranks is not None for row in rows]
    return tuple(replace(row, rank=next(places)) if found else row for row, found in zip(rows, ranked, strict=True))


def _headlines(runs: Sequence[Record]) -> dict[str, BoardHeadline]:
    """The headline scores of these runs, whose suites are equal."""
    found = {}
    for run in runs:
        for name, headline in run.headlines.items():
            parts = tuple(sorted(_column(score) for score in run.scores if score.headline == name))
            found[name] = BoardHeadline(parts, headline.higher_is_better, headline.chance)
    return found


def _row(runs: list[Record], counting: dict[SeedPair, Record], standings: Mapping[str, Standing]) -> Row:
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
        guest=False,
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
        train_joules=_mean(cost.phases["train"].joules if "train" in cost.phases else 0 for cost in costs),
        charged_flops=_mean(run.charged_flops for run in counting.values()),
        tokens_dropped=_mean(cost.tokens_dropped for cost in costs),
        targets={},
        peer=None,
        runs=len(counting),
        records=tuple(run.run_id for _, run in sorted(counting.items())),
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
