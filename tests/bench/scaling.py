"""`python -m tests.bench.scaling` (`make scaling`): how time grows with tokens, experts, width, pairs and classes.

Under four minutes on a quiet machine, with one thread. Each curve is a few points, timed in turns (A B C A B C ...);
its growth is fitted to all of them and stated in its picture, beside the floor: the FLOPs of matrix products over the
rate that this machine reached in the same run. It writes scaling.json here, docs/figures/scaling-NAME.svg, and the
marked part of docs/performance.md.

Shape suffixes: T tokens, D width, C classes.
"""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import typer

from tests.bench.floor import Rates
from tests.bench.rows import Settings
from tests.bench.timing import Step, interleave

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
FIGURES = Path("docs") / "figures"
Growth = Literal["power", "linear"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Seconds at each `x`, wall and CPU time, and the floor; `growth` says which law is fitted: a x^p, or a + b x."""

    name: str
    what: str
    variable: str
    growth: Growth
    x: tuple[float, ...]
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    floor: tuple[float, ...]

    def fit(self) -> tuple[float, float]:
        """(a, p) of a x^p or (a, b) of a + b x, by least squares on relative errors of the wall time."""
        x, y = np.array(self.x), np.array(self.wall)
        if self.growth == "power":
            p, log_a = np.polyfit(np.log(x), np.log(y), 1)
            return math.exp(log_a), float(p)
        b, a = np.polyfit(x, y, 1, w=1 / y)
        return float(a), float(b)

    def fitted(self, x: np.ndarray) -> np.ndarray:
        """Seconds by the fitted law."""
        a, b = self.fit()
        return a * x**b if self.growth == "power" else a + b * x

    def statement(self) -> str:
        """The growth in words: `time ~ D^1.93`, or `time ~ 0.12 s + 1.4 s * E / 32`."""
        a, b = self.fit()
        if self.growth == "power":
            return f"time ~ {self.variable}^{b:.2f}"
        last = self.x[-1]
        return f"time ~ {a:.3g} s {'-' if b < 0 else '+'} {abs(b) * last:.3g} s * {self.variable} / {last:,.0f}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is timed: `step(x)` makes the work for one value. `precision` names the rate that its floor is taken at."""

    name: str
    what: str
    variable: str
    growth: Growth
    x: tuple[int, ...]
    precision: str
    step: Callable[[int], Step]


def experiments(smaller: int = 1) -> Iterator[Experiment]:
    """All of them; `smaller` divides their sizes, for tests."""
    from tests.bench.layers import create_layer, layer_step, tokens

    def layer(count: int, width: int, experts: int = 8) -> Step:
        made = create_layer(width // smaller, 2.0, experts=experts)
        return layer_step(made, tokens(count // smaller, width // smaller, torch.device("cpu")), "bf16")

    about = "MoE layer, forward and backward, bf16"
    yield Experiment(
        name="tokens", what=f"{about}, D=512, 8 experts", variable="S", growth="power",
        x=(512, 1024, 2048, 4096, 8192), precision="bf16", step=lambda count: layer(count, 512),
    )  # fmt: skip
    yield Experiment(
        name="experts", what=f"{about}, S=2,048, D=256", variable="E", growth="linear",
        x=(2, 4, 8, 16, 32), precision="bf16", step=lambda number: layer(2048, 256, number),
    )  # fmt: skip
    yield Experiment(
        name="width", what=f"{about}, S=2,048, 8 experts", variable="D", growth="power",
        x=(128, 256, 512, 768, 1024), precision="bf16", step=lambda width: layer(2048, width),
    )  # fmt: skip
    yield Experiment(
        name="calibration", what="cluster-aware initialisation of a layer, D=256, 8 experts", variable="tokens",
        growth="linear", x=(8192, 16384, 32768, 65536), precision="fp64",
        step=lambda count: initialisation(count // smaller, 256 // smaller, 8192 // smaller),
    )  # fmt: skip
    yield Experiment(
        name="classes", what="zero-shot evaluation of 1,024 images, lab model", variable="classes", growth="linear",
        x=(64, 256, 1024, 2048, 4096), precision="fp32",
        step=lambda classes: evaluation(1024 // smaller, classes // smaller),
    )  # fmt: skip


def initialisation(count: int, width: int, cluster_tokens: int) -> Step:
    """Statistics of a stream of so many tokens, clusters fitted to the first of them, and the experts."""
    from tests.bench.initialisation import our_experts, token_stream
    from tests.bench.layers import random_ffn

    ffn = random_ffn(width, torch.Generator().manual_seed(0))
    return lambda: our_experts(ffn, token_stream(count, width, torch.device("cpu")), cluster_tokens)


def evaluation(images: int, classes: int) -> Step:
    """The zero-shot suite on a set of random pixels: it is read, prompts and images are encoded, images are judged."""
    from PIL import Image

    from tests.bench.training import lab_clip
    from upcycle_bench.data import evalset_write
    from upcycle_bench.planning.registry import load_registry
    from upcycle_bench.suite import EvalContext

    clip = lab_clip(torch.device("cpu"))
    folder = tempfile.TemporaryDirectory()  # it goes with the step that holds it
    pixels = np.random.default_rng(0).integers(256, size=(images, *clip.model.visual.image_size, 3), dtype=np.uint8)
    samples = ((Image.fromarray(image), number % classes) for number, image in enumerate(pixels))
    names = [f"thing number {number}" for number in range(classes)]
    evalset_write.write_classification(Path(folder.name) / "pixels", samples, names, ["a picture of a {c}"])
    suite = load_registry().get("suite", "zero-shot").target(sets=("pixels",), headlines={"pixels": ("pixels",)})

    def evaluate() -> Any:
        return suite.evaluate(
            EvalContext(
                model=clip.model.eval(),
                tokenizer=clip.tokenize,
                transform=clip.transform,
                root=Path(folder.name),
                device=torch.device("cpu"),
            )
        )

    return evaluate


def measure(experiment: Experiment, settings: Settings, rates: Rates) -> Curve:
    """Time all its points in turns and count their FLOPs."""
    from upcycle_bench.util.flops import counted_flops

    steps = [experiment.step(x) for x in experiment.x]
    floors = []
    for step in steps:
        with counted_flops() as counter:
            step()
        floors.append(counter.get_total_flops() / rates.flops[experiment.precision])
    samples = interleave(steps, settings.rounds, shortest=0.05)
    return Curve(
        name=experiment.name, what=experiment.what, variable=experiment.variable, growth=experiment.growth,
        x=experiment.x, wall=tuple(statistics.median(sample.wall for sample in taken) for taken in samples),
        cpu=tuple(statistics.median(sample.cpu for sample in taken) for taken in samples), floor=tuple(floors),
    )  # fmt: skip


def picture(curve: Curve) -> Figure:
    """Points, the fitted law and the floor, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    x = np.geomspace(curve.x[0], curve.x[-1], 50)
    axes.loglog(curve.x, curve.wall, "o", label="wall time")
    axes.loglog(curve.x, curve.cpu, "x", label="CPU time")
    axes.loglog(x, curve.fitted(x), "-", linewidth=1, label=curve.statement())
    axes.loglog(curve.x, curve.floor, "--", color="grey", linewidth=1, label="floor: FLOPs at the measured rate")
    axes.set(title=curve.what, xlabel=curve.variable, ylabel="seconds")
    axes.title.set_fontsize("small")
    axes.set_xticks(curve.x, [f"{value:,.0f}" for value in curve.x], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize="x-small")
    return figure


def markdown(curves: Sequence[Curve], about: str) -> str:
    """What stands in docs/performance.md."""
    lines = [
        about,
        "",
        "| what | points | growth | seconds, least and greatest | floors |",
        "| --- | --- | --- | --- | --- |",
    ]
    for curve in curves:
        points = f"{curve.variable} = {', '.join(f'{x:,.0f}' for x in curve.x)}"
        ends = [f"{values[0]:.3g} to {values[-1]:.3g}" for values in (curve.wall, curve.floor)]
        lines.append(f"| {curve.what} | {points} | {curve.statement()} | {' | '.join(ends)} |")
    pictures = [f"![{curve.what}](figures/scaling-{curve.name}.svg)" for curve in curves]
    return "\n".join([*lines, "", *pictures, ""])


def write(curves: Sequence[Curve], about: str, root: Path) -> None:
    """JSON, pictures and the document below `root`: everything is made before anything is written."""
    from tests.bench.report import put_into

    files = {
        Path("tests") / "bench" / "scaling.json": (json.dumps([asdict(c) for c in curves], indent=1) + "\n").encode()
    }
    for curve in curves:
        drawing = io.BytesIO()
        picture(curve).savefig(drawing, format="svg", metadata={"Date": None})
        files[FIGURES / f"scaling-{curve.name}.svg"] = drawing.getvalue()
    for path, content in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.write_bytes(content)
        os.replace(part, target)
    put_into(root / "docs" / "performance.md", markdown(curves, about), "scaling")


def main(
    only: Annotated[list[str] | None, typer.Option(help="A curve's name; then nothing is written.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every point is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Measure all curves, or show some."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)

    from tests.bench.floor import measure_rates
    from tests.bench.report import machine

    settings = Settings(threads=threads, rounds=rounds)
    chosen = [each for each in experiments() if not only or each.name in only]
    if not chosen:
        names = ", ".join(each.name for each in experiments())
        raise typer.BadParameter(f"no such curve; there are {names}")
    rates = measure_rates(settings)
    curves = []
    for experiment in chosen:
        curves.append(measure(experiment, settings, rates))
        print(f"{experiment.name}: {curves[-1].statement()}", file=sys.stderr)
    about = machine(settings, rates)
    print(markdown(curves, about))
    if not only:
        write(curves, about, ROOT)


if __name__ == "__main__":
    typer.run(main)
