"""Which records may be compared, and which of them count.

for records in comparable(every): counting = counting_runs(records)     # label -> seeds -> record
for records, closed in with_closed(every): ...                          # of an open table, those to compare it with
table_of(record)                                                    # what all records of a set have in common
shared_table_of(record)                                             # the same, whatever the run's compute
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from upcycle_bench.record import Record

SeedPair = tuple[int, int]  # seeds of initialisation and of training
Counting = Mapping[str, Mapping[SeedPair, Record]]  # strategy's label -> its runs that count
Table = tuple[str, str, str, tuple[tuple[str, str], ...], str]


def table_of(record: Record) -> Table:
    """Protocol, division, fingerprints of training and suites, and dense model: equal for records that compare."""
    protocol = record.protocol
    suites = tuple(sorted(protocol.suite_fingerprints.items()))
    return protocol.name, record.division, protocol.training_fingerprint, suites, record.hashes.dense


def shared_table_of(record: Record) -> Table:
    """The same, but a run of another compute belongs to the table of those whose protocol it shares.

    Its compute does not open its division, overrides and options do; but a control's options are its compute.
    """
    name, division, fingerprint, suites, dense = table_of(record)
    if record.protocol.shared_fingerprint and not record.protocol.overrides:
        fingerprint = record.protocol.shared_fingerprint
        if not record.strategy.off_defaults or record.strategy.status == "control":
            division = "closed"
    return name, division, fingerprint, suites, dense


VIEWS: dict[str, Callable[[Record], Table]] = {"steps": table_of, "compute": shared_table_of}


def comparable(records: Sequence[Record], table: Callable[[Record], Table] = table_of) -> list[list[Record]]:
    """The records in sets that may be compared, oldest first in each; those of a set have one `table`."""
    groups: dict[Table, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.created_at, r.run_id)):  # the last of every list is the newest
        groups[table(record)].append(record)
    return [groups[key] for key in sorted(groups)]


def with_closed(
    records: Sequence[Record], table: Callable[[Record], Table] = table_of
) -> list[tuple[list[Record], list[Record]]]:
    """`comparable`, and beside the records of an open division those of the closed one that were run and scored alike.

    Options alone change no fingerprint, so an ablation can be compared with the reference. Labels that the open
    division has itself are left out.
    """
    groups = {table(group[0]): group for group in comparable(records, table)}
    found = []
    for (protocol, division, *alike), group in groups.items():
        own = {record.strategy.label for record in group}
        closed = groups.get((protocol, "closed", *alike), []) if division == "open" else []  # type: ignore[arg-type]
        found.append((group, [record for record in closed if record.strategy.label not in own]))
    return found


def counting_runs(records: Sequence[Record]) -> dict[str, dict[SeedPair, Record]]:
    """The runs that count of each label, by seeds: of several successes with the same ones, the newest.

    `records` come oldest first. Of a row that was tuned again, the runs of the newest choice alone count.
    """
    found: dict[str, dict[SeedPair, Record]] = defaultdict(dict)
    newest = {run.strategy.label: run.strategy.tuned for run in records if run.status == "ok"}
    for run in records:
        by_seeds = found[run.strategy.label]
        if run.status == "ok" and run.strategy.tuned == newest[run.strategy.label]:
            by_seeds[run.seeds.init, run.seeds.train] = run
    return dict(found)


def directions(counting: Counting) -> dict[str, bool]:
    """Each headline score of these runs, and whether higher is better."""
    runs = [run for mine in counting.values() for run in mine.values()]
    return {name: each.higher_is_better for run in runs for name, each in run.headlines.items()}
