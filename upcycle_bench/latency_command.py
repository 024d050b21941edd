"""`upcycle-bench latency`: how fast models of ours serve, side by side. Imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from upcycle_bench import display
from upcycle_bench.command import interruptible
from upcycle_bench.options import Json


def latency(
    files: Annotated[list[Path], typer.Argument(help="Weights of ours, FILE.safetensors: dense or upcycled.")],
    repeats: Annotated[int, typer.Option(min=1, help="How often one input is timed; batches a quarter as often.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; else all.")] = None,
    as_json: Json = False,
) -> None:
    """Time inference of models in turns: one image or text alone, and batches of 256."""
    import torch

    from upcycle_bench import weights
    from upcycle_bench.costs import parameter_counts
    from upcycle_bench.engine import choose_device
    from upcycle_bench.latency import measure

    device = choose_device()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with interruptible("nothing was written"):
            clips = [weights.load(path) for path in files]
            speeds = measure(clips, device, repeats)
    finally:
        torch.set_num_threads(before)
    counts = [parameter_counts(clip.model) for clip in clips]
    if as_json:
        rows = [
            {"file": str(path), "parameters_total": total, "parameters_active": active, **asdict(speed)}
            for path, (total, active), speed in zip(files, counts, speeds, strict=True)
        ]
        print(json.dumps({"device": device.type, "threads": threads or before, "models": rows}, indent=2))
        return
    display.table(
        f"inference on {device.type}, {threads or before} threads",
        [
            {
                "file": path.stem[:16],  # ours are called by their sha256
                "M active / all": f"{active / 1e6:,.2f} / {total / 1e6:,.2f}",
                "one image": f"{speed.image_ms:.3g} ms",
                "one text": f"{speed.text_ms:.3g} ms",
                "images/s": f"{speed.images_per_second:,.0f}",
                "texts/s": f"{speed.texts_per_second:,.0f}",
            }
            for path, (total, active), speed in zip(files, counts, speeds, strict=True)
        ],
    )
