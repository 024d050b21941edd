"""Figures of runs: what routers and experts did while they trained (figures 4, 5, B.1 to B.4 of arXiv:2604.13508), and
how strategies rank (`rank_figure`).

    draw(read_runs([Path("results/lab")]), "entropy", Path("entropy.svg"))

A run is a record and the file of training metrics beside it. Runs of one label share a colour, whatever their seeds.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upcycle_bench import record
from upcycle_bench.record import Record
from upcycle_bench.reporting.rank_figure import draw_rankings
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = dict[str, Any]  # one line of the training metrics: what was logged at one step

FigureName = Literal[
    "loss", "similarity", "entropy", "compactness", "utilisation", "probability", "drift", "critical-difference"
]
# Figure -> (key in the metrics of a layer, title).
_BY_DEPTH: dict[str, tuple[str, str]] = {  # drawn over training, and layer by layer at its end
    "similarity": ("expert_cosine", "mean pairwise cosine of the experts"),
    "entropy": ("router_entropy", "router entropy, nats"),
    "compactness": ("relative_compactness", "relative compactness (reconstructed)"),
}
_BY_EXPERT: dict[str, tuple[str, str]] = {  # drawn expert by expert at the end of training, largest first
    "utilisation": ("load", "share of (token, choice) pairs"),
    "probability": ("routing_probability", "mean probability over the tokens routed to the expert"),
}


@dataclass(frozen=True)
class Run:
    """A record and its training metrics, an entry for each logged step; a run that did not train has none."""

    path: Path
    record: Record
    metrics: list[Metrics]

    @property
    def label(self) -> str:
        """The strategy's label, with its mark."""
        part = self.record.strategy
        return f"{part.label} ({part.kind})" if part.kind else part.label

    def last_layers(self) -> dict[str, dict[str, Any]]:
        """MoE layer -> its metrics at the last logged step."""
        return self.metrics[-1]["layers"]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The successful runs below those paths, sorted by label and training seed.

    Raises UserError for a *.json that is not a record, and where no run succeeded.
    """
    found = [path for each in paths for path in record.record_paths(each)]
    runs = [Run(path, made, _metrics(path)) for path in found if (made := record.read(path)).status == "ok"]
    if not runs:
        raise UserError(f"no successful run at {', '.join(map(str, paths))}: give records or folders with records.")
    return sorted(runs, key=lambda run: (run.record.strategy.label, run.record.seeds.train, run.record.created))


def _metrics(path: Path) -> list[Metrics]:
    beside = path.with_suffix(".jsonl")
    return [strict_json.loads(line) for line in beside.read_text().splitlines()] if beside.is_file() else []


def draw(runs: Sequence[Run], name: FigureName, output: Path) -> list[Path]:
    """Write the figure to `output`, whose suffix names the format; returns the paths of the records it shows.

    Raises UserError for a suffix that names no format, and where no run has what the figure shows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    kinds = FigureCanvasAgg(figure).get_supported_filetypes()
    if output.suffix.removeprefix(".") not in kinds:
        raise UserError(f"--output {output}: end it in .png, .svg or .pdf.")
    if name == "critical-difference":
        drawn = {id(each) for each in draw_rankings(figure, [run.record for run in runs])}
        shown = [run for run in runs if id(run.record) in drawn]
    else:
        shown = _draw_training(figure, runs, name)
    drawing = io.BytesIO()  # matplotlib writes to memory, so an interruption leaves the old file
    kind = output.suffix.removeprefix(".")
    figure.savefig(drawing, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(output, drawing.getvalue())
    return [run.path for run in shown]


def _draw_training(figure: Figure, runs: Sequence[Run], name: FigureName) -> list[Run]:
    """What happened in training; returns the runs that have it."""
    shown = [run for run in runs if _has(run, name)]
    if not shown:
        raise UserError(
            f"--figure {name}: none of {len(runs)} runs has what it shows: training of an upcycled model (not a dense "
            "one), by this version (`run --fresh` trains again)."
        )
    if name == "loss":
        _over_training(figure.subplots(), shown, lambda row: row["contrastive"], "contrastive loss in training")
    elif name == "drift":
        _drift(figure, shown)
    elif name in _BY_DEPTH:
        _depth(figure, shown, *_BY_DEPTH[name])
    else:
        _experts(figure, shown, *_BY_EXPERT[name])
    first = figure.axes[0]
    handles = dict(zip(*reversed(first.get_legend_handles_labels()), strict=True))  # one entry for all seeds
    legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label may hold $
    return shown


def _has(run: Run, name: FigureName) -> bool:
    """Whether the run has the metrics that the figure shows."""
    if name == "drift":
        return bool((run.record.receipt or {}).get("layers"))
    if name == "loss":
        return bool(run.metrics)
    key = (_BY_DEPTH | _BY_EXPERT)[name][0]
    layers = run.metrics[-1].get("layers", {}) if run.metrics else {}
    return any(numbers[key] is not None for numbers in layers.values())


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    labels = list(dict.fromkeys(run.label for run in runs))
    return {label: f"C{place % 10}" for place, label in enumerate(labels)}


def _over_training(axes: Axes, runs: Sequence[Run], value: Callable[[Metrics], float | None], title: str) -> None:
    colours = _colours(runs)
    for run in runs:
        points = [(row["step"], y) for row in run.metrics if (y := value(row)) is not None]
        axes.plot(*zip(*points, strict=True), color=colours[run.label], label=run.label, linewidth=1)
    axes.set(title=title, xlabel="step")


def _depth(figure: Figure, runs: Sequence[Run], key: str, title: str) -> None:
    """A column for each tower: above, the mean over its layers during training; below, each layer at the end."""
    towers = _towers(runs)
    figure.set_size_inches(5 * len(towers), 7)
    panels = figure.subplots(2, len(towers), squeeze=False)
    colours = _colours(runs)
    for column, tower in enumerate(towers):
        _over_training(panels[0, column], runs, lambda row, tower=tower: _mean(row["layers"], tower, key), tower)  # type: ignore[misc]
        for run in runs:
            points = [
                (int(layer.partition(".")[2]), numbers[key])
                for layer, numbers in run.last_layers().items()
                if layer.startswith(f"{tower}.") and numbers[key] is not None
            ]
            panels[1, column].plot(*zip(*points, strict=True), "o-", color=colours[run.label], label=run.label)
        panels[1, column].set(xlabel="block, at the end of training")
        panels[1, column].xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(title)


def _towers(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(layer.partition(".")[0] for run in runs for layer in run.last_layers()))


def _mean(layers: dict[str, dict[str, Any]], tower: str, key: str) -> float | None:
    values = [numbers[key] for layer, numbers in layers.items() if layer.startswith(f"{tower}.")]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _experts(figure: Figure, runs: Sequence[Run], key: str, title: str) -> None:
    """A panel for each layer: the experts at the end of training, largest first."""
    layers = list(dict.fromkeys(layer for run in runs for layer in run.last_layers()))
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure.set_size_inches(3.5 * columns, 2.6 * rows + 1)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    colours = _colours(runs)
    for place, axes in enumerate(panels.flat):
        axes.set_visible(place < len(layers))
        for run in runs if place < len(layers) else ():
            values = run.last_layers().get(layers[place], {}).get(key, [])
            ranked = sorted((value for value in values if value is not None), reverse=True)
            axes.plot(range(1, len(ranked) + 1), ranked, "o-", color=colours[run.label], label=run.label, linewidth=1)
            axes.set(title=layers[place], xlabel="expert, by rank")
    figure.supylabel(title)


def _drift(figure: Figure, runs: Sequence[Run]) -> None:
    """The distance of each layer's output from the dense FFN's, before and after training."""
    figure.set_size_inches(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    colours = _colours(runs)
    for axes, title in zip(panels, ("step 0", "after training"), strict=True):
        for run in runs:
            tree: Any = run.record.receipt if title == "step 0" else run.record.diagnostics
            drift = {layer: numbers["function_drift"] for layer, numbers in tree["layers"].items()}
            axes.plot(list(drift), list(drift.values()), "o-", color=colours[run.label], label=run.label, linewidth=1)
        axes.set(title=title)
    figure.supylabel("relative L2 error against the dense FFN")
