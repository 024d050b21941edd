"""test_bad_in_training starts it on every rank: bad samples of several ranks, and what each rank knows of them.

usage: python -m tests.training.bad_worker OUTPUT
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.training.test_loop import job
from upcycle_bench.data.bad_samples import Bad
from upcycle_bench.data.batches import Batch, BatchSource
from upcycle_bench.training import session
from upcycle_bench.training.bookkeeping import Bookkeeping
from upcycle_bench.training.checkpoint import MetricsFile
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError


class Source(BatchSource):
    """Refuses more than three bad samples, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def part(self, *_: Any) -> Batch:
        raise AssertionError

    def judge(self, kinds: Mapping[str, int], first: Mapping[str, str], read: int) -> None:
        if sum(kinds.values()) > 3:
            raise UserError(f"{sum(kinds.values())} of {read} are bad")

    def found(self, bad: Sequence[Bad]) -> None:
        self.told += [each.number for each in bad]


def main(output: str) -> None:
    with session.open_session(threads=1):
        rank, source = distributed.rank(), Source()
        books = Bookkeeping(job(), {}, MetricsFile(None, 0), source)
        met = [Bad(7, "truncated image", "0.tar", "a"), Bad(rank, "not UTF-8", f"{rank}.tar", "b")]
        books.count_step({"contrastive": torch.ones(())}, met[rank:])
        books.collect()
        progress = books.progress
        facts: dict[str, Any] = {"kinds": {**progress.bad_samples}, "first": progress.first_bad, "told": [*source.told]}
        books.count_step(
            {"contrastive": torch.ones(())}, [Bad(7, "truncated image", "0.tar", "a")] if rank == 1 else []
        )
        try:
            books.collect()
        except UserError as error:
            facts["error"] = str(error)
        facts["then told"] = source.told
        every = distributed.from_all(facts)
        if distributed.is_main():
            Path(output).write_text(json.dumps(every))


if __name__ == "__main__":
    main(sys.argv[1])
