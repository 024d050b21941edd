"""`upcycle-bench experts`: pictures of the images that each expert takes. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import (
    EvalData,
    Json,
    interruptible,
    names_of,
    open_registry,
    terminal_reporter,
    writable_place,
)
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.reporting.contact_sheets import Sheet


def experts(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A record (.json) or weights of ours (.safetensors).")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to: one LAYER.png for each layer.")],
    images: Annotated[
        str | None, typer.Option(help="Evaluation sets, a,b; else those of the protocol's suite `diagnostics`.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", "-p", help="Whose evaluation sets; else the record's, or lab.")
    ] = None,
    eval_data: EvalData = None,
    columns: Annotated[int, typer.Option(min=1, max=100, help="How many images of each expert.")] = 16,
    as_json: Json = False,
) -> None:
    """Draw which images each expert takes: a contact sheet for each layer of the vision tower."""
    writable_place(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; give a folder for the sheets.")
    from upcycle_bench.planning.suites import make_suites
    from upcycle_bench.protocol import load_protocol
    from upcycle_bench.reporting import contact_sheets

    registry = open_registry()
    clip, made = contact_sheets.find_model(run)
    name = protocol or (made.protocol.name if made else "lab")
    settings = load_protocol(registry.get("protocol", name).target)
    chosen = names_of(images, "--images")
    if not chosen:
        chosen = list(make_suites(registry, settings, ["diagnostics"])["diagnostics"].images)  # type: ignore[attr-defined]
    with interruptible("no sheet was written"):
        context = contact_sheets.eval_context(clip, settings, eval_data, terminal_reporter())
        title = made.strategy.label if made else run.name
        sheets = contact_sheets.draw(clip, context, chosen, columns=columns, title=title)
    paths = contact_sheets.save(sheets, output)
    _show(sheets, paths, chosen, as_json)


def _show(sheets: Mapping[str, Sheet], paths: Mapping[str, Path], images: Sequence[str], as_json: bool) -> None:
    """Each sheet's file, and how far the experts of its layer agree with the labels."""
    if as_json:
        layers = {layer: {"sheet": str(paths[layer]), **sheet.facts()} for layer, sheet in sheets.items()}
        print(strict_json.dumps({"images": images, "layers": layers}, indent=2))
        return
    for layer, sheet in sheets.items():
        said = (f"{metric} {found.value:.3f} (chance {found.chance:.3f})" for metric, found in sheet.found.items())
        print(f"{paths[layer]}: {', '.join(said)}")
