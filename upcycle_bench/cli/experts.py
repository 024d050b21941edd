"""`upcycle-bench experts`: a picture of which images each expert takes. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import Json, interruptible, names_of, terminal_reporter, warn_broken, writable_file
from upcycle_bench.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.experts import Sheet
    from upcycle_bench.protocol import Protocol


def experts(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A record (.json) or weights of ours (.safetensors).")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to: one LAYER.png for each layer.")],
    images: Annotated[
        str | None, typer.Option(help="Evaluation sets, a,b; else those of the protocol's suite `diagnostics`.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", "-p", help="Whose evaluation sets; else the record's, or lab.")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Folder with the evaluation sets (clip-*).")] = None,
    columns: Annotated[int, typer.Option(min=1, max=100, help="How many images of each expert.")] = 16,
    as_json: Json = False,
) -> None:
    """Draw which images each expert takes: a contact sheet for each layer of the vision tower."""
    writable_file(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; give a folder for the sheets.")
    import torch

    from upcycle_bench import engine
    from upcycle_bench.experts import draw, find_model
    from upcycle_bench.plan import make_suites
    from upcycle_bench.protocol import load_protocol
    from upcycle_bench.registry import load_registry
    from upcycle_bench.suite import EvalContext
    from upcycle_bench.worlds import load_world

    registry = load_registry()
    warn_broken(registry.broken)
    clip, made = find_model(run)
    name = protocol or (made.protocol.name if made else "lab")
    settings = load_protocol(registry.get("protocol", name).target)
    chosen = names_of(images, "--images")
    if not chosen:
        chosen = list(make_suites(registry, settings, ["diagnostics"])["diagnostics"].images)  # type: ignore[attr-defined]
    _check_data(settings, eval_data)
    reporter = terminal_reporter()
    with interruptible("no sheet was written"):
        device = engine.choose_device()
        torch.set_num_threads(settings.threads)
        context = EvalContext(
            model=clip.model.to(device),
            tokenizer=clip.tokenize,
            transform=clip.transform,
            root=eval_data or load_world(settings.data.world, settings.data.seed, reporter).eval_root,
            device=device,
            track=reporter.track,
        )
        title = made.strategy.label if made else run.name
        sheets = draw(clip, context, chosen, columns=columns, title=title)
    _save(sheets, output)
    _show(sheets, output, chosen, as_json)


def _check_data(settings: Protocol, eval_data: Path | None) -> None:
    local = settings.data.world == "local"
    if local != (eval_data is not None):
        raise UserError(
            f"protocol {settings.name} needs --eval-data, the folder with the evaluation sets."
            if local
            else f"protocol {settings.name} brings its own data; --eval-data goes with clip-b32, clip-b16."
        )


def _save(sheets: Mapping[str, Sheet], output: Path) -> None:
    output.mkdir(exist_ok=True)
    for layer, sheet in sheets.items():
        part = output / f".{layer}.png.part"
        sheet.image.save(part, format="PNG", optimize=True)
        os.replace(part, output / f"{layer}.png")


def _show(sheets: Mapping[str, Sheet], output: Path, chosen: Sequence[str], as_json: bool) -> None:
    if as_json:
        layers = {
            layer: {
                "sheet": str(output / f"{layer}.png"),
                "load": sheet.load_N.tolist(),
                "agreement": {metric: asdict(found) for metric, found in sheet.found.items()},
            }
            for layer, sheet in sheets.items()
        }
        print(json.dumps({"images": chosen, "layers": layers}, indent=2))
        return
    for layer, sheet in sheets.items():
        said = (f"{metric} {found.value:.3f} (chance {found.chance:.3f})" for metric, found in sheet.found.items())
        print(f"{output / layer}.png: {', '.join(said)}")
