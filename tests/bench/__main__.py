"""`python -m tests.bench`: measure, print, write. See the package's docstring."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

LATEST = Path(__file__).parent / "latest.json"


def main(
    only: Annotated[list[str] | None, typer.Option(help="A row's number or a part of its function's name.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often both sides are timed, in turns.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of both sides.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help=f"Where rows go [all: {LATEST.name}].")] = None,
    markdown: Annotated[Path | None, typer.Option(help="A file between whose marks the table goes.")] = None,
) -> None:
    """Measure all rows, or some."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a session takes a GPU where it sees one
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

    from tests.bench import initialisation, layers, pipeline, probing, steps  # noqa: F401  (they register their rows)
    from tests.bench.floor import measure_rates
    from tests.bench.report import machine, put_into, write_json
    from tests.bench.report import markdown as as_markdown
    from tests.bench.rows import MEASURES, Settings, SkippedError
    from upcycle_bench.training import session
    from upcycle_bench.training.allocator import return_freed_memory

    chosen = {
        number: measure
        for number, measure in sorted(MEASURES.items())
        if not only or any(text == str(number) or (not text.isdigit() and text in measure.__name__) for text in only)
    }
    if not chosen:
        names = ", ".join(f"{number} {measure.__name__}" for number, measure in sorted(MEASURES.items()))
        raise typer.BadParameter(f"no such row; there are {names}")
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    with session.open_session(threads) as found:
        if found.type != device:
            raise typer.BadParameter(f"--device {device}: this machine has only {found.type}")
        settings = Settings(threads=threads, rounds=rounds, device=found)
        rates = measure_rates(settings)
        for number, measure in chosen.items():
            rows = results[number] = []
            gc.collect()
            return_freed_memory()  # as a process of its own would begin: what earlier rows left scatters
            try:
                for row in measure(settings):
                    rows.append(row)
                    print(
                        f"{number:>2}  {row.name}: {row.value:.3f} {row.unit} (goal {row.goal or 'none'})",
                        file=sys.stderr,
                    )
            except SkippedError as reason:
                results[number] = f"skipped: {reason}"
            except Exception as error:
                traceback.print_exc()
                failures[number] = f"failed: {type(error).__name__}"
        text = as_markdown(results, machine(settings, rates), failures)
    print(text)
    path = json_path or (None if only else LATEST)
    if path is not None:
        write_json(results, path)
    if markdown is not None:
        put_into(markdown, text)
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
