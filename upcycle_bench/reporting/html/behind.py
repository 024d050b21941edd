"""The records behind each row of a board.

for board, behind in zip(boards, records_of(boards, runs)):
    counting(behind["sparse-upcycling"])      # of that row, those that count
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upcycle_bench.record import Record
from upcycle_bench.reporting.leaderboard import Board

Runs = Sequence[tuple[Record, Path]]
Behind = dict[str, Runs]  # a row's label -> its records, oldest first


def records_of(boards: Sequence[Board], runs: Runs) -> list[Behind]:
    """For each board, the records behind its rows. `runs` holds those of all boards, in any order."""
    grouped: dict[tuple[Any, ...], dict[str, list[tuple[Record, Path]]]] = defaultdict(lambda: defaultdict(list))
    for record, path in sorted(runs, key=lambda run: (run[0].created_at, run[0].run_id)):  # as `leaderboard.build`
        part = record.protocol
        suites = tuple(sorted(part.suite_fingerprints.items()))
        key = (part.name, part.division, part.training_fingerprint, suites, record.hashes.dense)
        grouped[key][record.strategy.label].append((record, path))
    found: list[Behind] = []
    for board in boards:
        suites = tuple(board.suite_fingerprints.items())
        mine = grouped[board.protocol, board.division, board.training_fingerprint, suites, board.dense]
        found.append({row.label: mine[row.label] for row in board.rows})
    return found


def counting(runs: Runs) -> list[Record]:
    """The newest success of each pair of seeds, as in `leaderboard`."""
    return list({(run.seeds.init, run.seeds.train): run for run, _ in runs if run.status == "ok"}.values())
