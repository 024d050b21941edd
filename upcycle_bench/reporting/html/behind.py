"""The records behind each row of a board.

for board, behind in zip(boards, records_of(boards, runs)):
    counting(behind["sparse-upcycling"])      # of that row, those that count
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from upcycle_bench.record import Record
from upcycle_bench.reporting.board import Board
from upcycle_bench.reporting.comparable import VIEWS, Table, counting_runs, with_closed

Runs = Sequence[tuple[Record, Path]]
Behind = dict[str, Runs]  # a row's label -> its records, oldest first


def records_of(boards: Sequence[Board], runs: Runs) -> list[Behind]:
    """For each board, the records behind its rows. `runs` holds those of all boards, in any order."""
    paths = {id(record): path for record, path in runs}
    behind: dict[tuple[str, Table], dict[str, list[tuple[Record, Path]]]] = {}
    for view in {board.view for board in boards}:
        table = VIEWS[view]
        for records, closed in with_closed([record for record, _ in runs], table):
            mine = behind.setdefault((view, table(records[0])), defaultdict(list))
            for record in [*records, *closed]:
                mine[record.strategy.label].append((record, paths[id(record)]))
    return [{row.label: behind[board.view, board.table][row.label] for row in board.rows} for board in boards]


def counting(runs: Runs) -> list[Record]:
    """The newest success of each pair of seeds."""
    return [run for mine in counting_runs([run for run, _ in runs]).values() for run in mine.values()]
