"""`--jobs` of `run` and `launch`: a number, or auto.

at_once = jobs_of("4") or chosen_jobs(cells, results)           # auto is said, with why
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import is_main
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.planning.matrix import Cell

Jobs = Annotated[
    str, typer.Option("--jobs", "-j", metavar="N|auto", help="Of several runs, how many at once; auto: what fits here.")
]


def jobs_of(text: str) -> int | None:
    """The number of `--jobs`, or None for `auto`. UserError for anything else."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--jobs {text}: write a number from 1 on, or auto.")
    return int(text)


def chosen_jobs(cells: Sequence[Cell], results: Path, processes: int = 1, gpus: int = 1) -> int:
    """The number that `--jobs auto` stands for, which is said with why; a run has so many processes and GPUs."""
    from upcycle_bench.planning.at_once import choose

    number, why = choose(cells, results, processes, gpus)
    if is_main():
        print(f"--jobs auto: {number} at once ({why})", file=sys.stderr)
    return number
