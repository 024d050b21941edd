"""`upcycle-bench upcycle`: from the weights of an open_clip CLIP to one safetensors file. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upcycle_bench.cli.common import (
    Force,
    Interpolate,
    Json,
    Options,
    PixelSettings,
    check_output,
    interruptible,
    key_value,
    open_registry,
    refuse_existing,
    require_one_process,
    terminal_reporter,
)
from upcycle_bench.cli.evaluate import images_line
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError


def upcycle(
    model: Annotated[
        str, typer.Option("--model", "-m", help="The dense model: ViT-B-32, a folder, hf-hub:ORG/NAME, a JSON file.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the upcycled model goes.")],
    pretrained: Annotated[
        str | None,
        typer.Option(metavar="FILE|TAG|FOLDER", help="Its weights, if they stand elsewhere: laion2b_s34b_b79k."),
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", help="Which strategy; see `list strategies`.")
    ] = "cluster-aware",
    calibration: Annotated[
        str | None,
        typer.Option(help="Shards for strategies that calibrate: a folder, or shards-{000..003}.tar."),
    ] = None,
    captions: Annotated[
        Literal["text", "lines"], typer.Option(help="What a .txt of the shards is: one text, or one caption a line.")
    ] = "text",
    option: Options = None,
    seed: Annotated[int, typer.Option(min=0, help="The strategy's own randomness and the calibration sample.")] = 0,
    experts: Annotated[int, typer.Option(help="Experts in a layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that a token uses.")] = 2,
    every: Annotated[int, typer.Option(help="Every how many blocks one is replaced.")] = 2,
    offset: Annotated[int, typer.Option(help="The first block that is replaced.")] = 1,
    capacity_factor: Annotated[float, typer.Option(help="Room of an expert in training.")] = 2.0,
    pixels: PixelSettings = None,
    interpolate: Interpolate = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a dense open_clip model into one with experts: one file that loads and serves."""
    from upcycle_bench import api
    from upcycle_bench.data.sources import expand_shards
    from upcycle_bench.model.pixels import parsed
    from upcycle_bench.model.pretrained import Choices, find_pretrained
    from upcycle_bench.model.upcyclable import require_upcyclable
    from upcycle_bench.strategy import resolve_moe
    from upcycle_bench.upcycling.from_checkpoint import Request, choose_strategy, moe_settings, upcycle_checkpoint

    require_one_process("upcycle")
    open_registry()  # names the plugins that do not load
    check_output(output)
    refuse_existing(output, force)
    chosen = choose_strategy(strategy, dict(key_value(text) for text in option or []))
    settings = moe_settings(experts=experts, top_k=top_k, every=every, offset=offset, capacity_factor=capacity_factor)
    moe = resolve_moe(chosen, settings)
    shards = expand_shards(calibration, "--calibration") if calibration is not None else ()
    if chosen.calibration_pairs and not shards:
        raise UserError(
            f"{strategy} calibrates on {chosen.calibration_pairs:,} image-text pairs: give --calibration, webdataset "
            "shards, for example 'train/{000..127}.tar'."
        )
    choices, reporter = Choices(parsed(pixels or []), interpolate), terminal_reporter()
    with interruptible("nothing was written"), _warnings_as_lines():
        require_upcyclable(model, moe, trained=False)
        with reporter.task(f"finding the weights of {model}"):
            source = find_pretrained(model, pretrained, choices)
        request = Request(source=source, strategy=chosen, moe=moe, shards=shards, seed=seed, captions=captions)
        made = upcycle_checkpoint(request, reporter)
        with made.meter.phase("write"), reporter.task(f"writing {output}"):
            refuse_existing(output, force)
            digest = api.save(made.model, output, source.name)
    written = {"output": str(output), "bytes": output.stat().st_size, "sha256": digest}
    facts = {**made.facts, "phases": made.phases, **written}
    if as_json:
        print(strict_json.dumps(facts, indent=2))
    else:
        show_upcycled(facts)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings of strategies as lines on the terminal, without Python's file names."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def show_upcycled(facts: Mapping[str, Any]) -> None:
    """How far each layer is from the dense model; size and cost of the model, and its file."""
    rows = [
        {
            "layer": name,
            "function drift": f"{layer['function_drift']:.4f}",
            "expert cosine": f"{layer['expert_cosine']:.4f}",
            "router entropy": f"{layer['router_entropy']:.4f}",
        }
        for name, layer in facts["layers"].items()
    ]
    table(f"{facts['strategy']}, {facts['model']}, seed {facts['seed']}", rows)
    cosine = facts["feature_cosine_with_dense"]
    print(
        f"features' cosine with the dense model's: image {cosine['vision']:.4f}, text {cosine['text']:.4f} "
        f"(as all of the above, on {facts['compared_on']})"
    )
    print(
        f"{facts['parameters_total']:,} parameters, {facts['parameters_active']:,} active; "
        f"dense: {facts['parameters_dense']:,}"
    )
    print(images_line(facts["pixels"]))
    for name, change in facts["interpolated"].items():
        print(f"{name} was resized from {change}")
    phases = facts["phases"]
    peak = max(phase["peak_memory_bytes"] for phase in phases.values())
    parts = [f"{name} {phase['seconds']:.1f} s" for name, phase in phases.items()]
    print("; ".join(parts) + f"; peak memory {peak / 2**30:.2f} GiB")
    print(f"{facts['output']}: {facts['bytes'] / 2**20:,.0f} MiB, sha256 {facts['sha256']}")
