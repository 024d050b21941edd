"""`upcycle-bench latency`: how fast models of ours serve, measured side by side. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from upcycle_bench.cli.common import Json, interruptible
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json


def latency(
    files: Annotated[list[Path], typer.Argument(help="Weights of ours, FILE.safetensors: dense or upcycled.")],
    repeats: Annotated[int, typer.Option(min=1, help="How often one input is timed; batches a quarter as often.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; else all.")] = None,
    as_json: Json = False,
) -> None:
    """Time inference of models in turns: one image or text alone, and batches of 256."""
    from upcycle_bench.reporting.latency import measure_files

    with interruptible("nothing was written"):
        facts = measure_files(files, repeats, threads)
    if as_json:
        print(strict_json.dumps(facts, indent=2))
    else:
        table(f"inference on {facts['device']}, {facts['threads']} threads", _rows(facts["models"]))


def _rows(models: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each model."""
    return [
        {
            "file": Path(model["file"]).stem[:16],  # our files are named by their sha256
            "M active / all": f"{model['parameters_active'] / 1e6:,.2f} / {model['parameters_total'] / 1e6:,.2f}",
            "one image": f"{model['image_ms']:.3g} ms",
            "one text": f"{model['text_ms']:.3g} ms",
            "images/s": f"{model['images_per_second']:,.0f}",
            "texts/s": f"{model['texts_per_second']:,.0f}",
        }
        for model in models
    ]
