"""`upcycle-bench plot`: figures of runs. Imports nothing heavy."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from upcycle_bench.cli.common import Json, writable_file
from upcycle_bench.util import strict_json


class Figure(str, Enum):
    """The figures that can be drawn."""

    loss = "loss"
    similarity = "similarity"
    entropy = "entropy"
    compactness = "compactness"
    utilisation = "utilisation"
    probability = "probability"
    drift = "drift"
    critical_difference = "critical-difference"


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Records: files or folders.")],
    figure: Annotated[Figure, typer.Option("--figure", "-f", help="What to draw.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to: FILE.png, FILE.svg or FILE.pdf.")],
    as_json: Json = False,
) -> None:
    """Draw what routers and experts did in training, or how strategies rank over seeds (critical-difference)."""
    writable_file(output)
    from upcycle_bench.reporting.figures import draw, read_runs

    drawn = draw(read_runs(runs), figure.value, output)
    if as_json:
        print(
            strict_json.dumps({"figure": figure.value, "output": str(output), "records": [str(path) for path in drawn]})
        )
    else:
        print(f"{output}: {figure.value} of {len(drawn)} runs")
