"""`upcycle-bench evaluate`: any checkpoint through the suites. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from upcycle_bench.cli.common import (
    Force,
    Interpolate,
    Json,
    PixelSettings,
    Suites,
    interruptible,
    names_of,
    open_registry,
    refuse_existing,
    require_one_process,
    terminal_reporter,
    writable_file,
)
from upcycle_bench.cli.tables import show_headlines, show_scores, show_skipped


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="A file or record of ours, a folder, hf-hub:ORG/NAME; with --model a file or a tag.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Which model it is, for what does not say it: ViT-B-32.")
    ] = None,
    pixels: PixelSettings = None,
    interpolate: Interpolate = False,
    protocol: Annotated[
        str | None, typer.Option("--protocol", "-p", help="Whose suites; else the record's protocol, or lab.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your evaluation sets, a folder: every valid one, or those of --protocol.")
    ] = None,
    suite: Suites = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Where the scores go.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score any checkpoint, dense or upcycled, by a protocol's suites or on your own data."""
    require_one_process("evaluate")
    if output is not None:
        writable_file(output)
        refuse_existing(output, force)
    names = names_of(suite, "--suite")
    with interruptible("nothing was written"):
        from upcycle_bench.evaluation.checkpoint import score_checkpoint
        from upcycle_bench.model.pixels import parsed
        from upcycle_bench.model.pretrained import Choices

        choices, reporter = Choices(parsed(pixels or []), interpolate), terminal_reporter()
        facts = score_checkpoint(open_registry(), checkpoint, model, protocol, data, names, reporter, choices)
    text = json.dumps(facts, indent=2, allow_nan=False)
    if output is not None:
        from upcycle_bench.util.files import write_atomically

        write_atomically(output, f"{text}\n".encode())
    if as_json:
        print(text)
    else:
        show_evaluation(facts, output)


def show_evaluation(facts: Mapping[str, Any], output: Path | None) -> None:
    """Scores, size and certificate of the model, and the file that holds them."""
    from upcycle_bench.suite import is_average

    scored = f"protocol {facts['protocol']}" if facts["protocol"] else facts["data"]
    show_scores(f"{facts['checkpoint']} ({facts['model']}), {scored}", facts["scores"])
    show_skipped(facts["skipped"])
    show_headlines(facts["headlines"], facts["scores"])
    if any(is_average(score["dataset"]) for score in facts["scores"]):
        print(f"all {len(facts['scores'])} scores, of each set and stratum, are what --output or --json has")
    total, active = facts["parameters_total"], facts["parameters_active"]
    print(f"{total:,} parameters, {active:,} active; {facts['seconds']:.1f} s; sha256 {facts['sha256']}")
    print(images_line(facts["pixels"]))
    for name, change in facts["interpolated"].items():
        print(f"{name} was resized from {change}")
    show_certificate(facts["certificate"])
    if output is not None:
        print(f"scores: {output}")


def images_line(pixels: Mapping[str, Any]) -> str:
    """How images became pixels, in a line."""
    size = "x".join(map(str, pixels["size"])) if isinstance(pixels["size"], list) else str(pixels["size"])
    colours = (f"{name} {', '.join(f'{value:.4g}' for value in pixels[name])}" for name in ("mean", "std"))
    return f"images: {size} pixels, {pixels['interpolation']}, {pixels['resize_mode']}; {'; '.join(colours)}"


def show_certificate(proof: Mapping[str, Any] | None) -> None:
    """What the certificate of an evaluation covers and what it leaves out, in the terminal's width."""
    import textwrap

    from rich.console import Console

    text = "none; no suite let the model be watched" if proof is None else "; ".join(_certified(proof))
    width = Console().width
    print(textwrap.fill(f"certificate: {text}", width, subsequent_indent="  ", break_on_hyphens=False))


def _certified(proof: Mapping[str, Any]) -> Iterator[str]:
    """The certificate, clause by clause."""
    sizes = " and ".join(str(repeat["batch_size"]) for repeat in proof["repeats"])
    differing = sum(repeat["differing"] for repeat in proof["repeats"])
    same = f"{differing} differ, by a tie of experts" if differing else "the same"
    yield f"{proof['predictions']:,} predictions again in batches of {sizes}, the last in another order: {same}"
    if proof["reloaded"]:
        yield "the saved file gives the same"
    if proof["choices_routed"]:
        yield f"0 of {proof['choices_routed']:,} choices of tokens dropped"
    for control in proof["controls"]:
        what = "labels" if control["permuted"] == "labels" else "class names"
        yield (
            f"{what} of {control['dataset']} shuffled {control['draws']} times: {control['metric']} "
            f"{control['value']:.4f}, chance {control['chance']:.4f} on {control['samples']} samples"
        )
    if proof["controls"]:
        yield "these are balanced subsets with fewer classes or captions, so their chance is not the tables'"
    if proof["uncontrolled"]:
        yield f"not controlled: {proof['uncontrolled'].rstrip('.')}"
    if proof["uncovered"]:
        yield f"not covered: the fine-tuned copies that {proof['uncovered']} scores"
    yield "weights unchanged"
    yield f"{proof['seconds']:.1f} s"
