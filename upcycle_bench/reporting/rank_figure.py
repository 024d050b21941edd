"""Critical-difference diagrams of runs: a panel for each table and headline score.

draw_rankings(figure, records)          # matplotlib's Figure; returns the records of the strategies in it
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import comparable, counting_runs
from upcycle_bench.reporting.critical_difference import Ranking, rankings
from upcycle_bench.reporting.formats import CONTROL
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LETTERS = 32  # of a name
WIDTH = 10.0  # inches


def draw_rankings(figure: Figure, records: Sequence[Record]) -> list[Record]:
    """Draw all that can be drawn, and return its records; a headline score that cannot has the line that says why.

    UserError where none can be drawn.
    """
    found = [
        (f"{runs[0].protocol.name}, {headline}", counting, ranking)
        for runs in comparable(records)
        for counting in [counting_runs(runs)]
        for headline, ranking in rankings(counting).items()
    ]
    drawn = [ranking for _, _, ranking in found if isinstance(ranking, Ranking)]
    if not drawn:
        raise UserError(f"--figure critical-difference: {found[0][2]}")
    heights = [2.4 + 0.14 * len(r.ranks) + 0.2 * len(r.groups) if isinstance(r, Ranking) else 0.8 for _, _, r in found]
    figure.set_size_inches(WIDTH, sum(heights))
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    shown: dict[int, Record] = {}
    for axes, (title, counting, ranking) in zip(panels, found, strict=True):
        axes.set_title(title, loc="left", fontsize="medium", parse_math=False)
        if isinstance(ranking, Ranking):
            _diagram(axes, ranking)
            shown |= {id(run): run for label in ranking.ranks for run in counting[label].values()}
        else:
            axes.set_axis_off()
            axes.text(0, 0.5, textwrap.fill(ranking, 120), fontsize="small", parse_math=False, va="center")
    return list(shown.values())


def _diagram(axes: Axes, ranking: Ranking) -> None:
    import pandas
    from scikit_posthocs import critical_difference_diagram

    names = short_names(ranking.ranks, LETTERS)
    together = {label: {other for group in ranking.groups if label in group for other in group} for label in names}
    tied = [[float(other == label or other in together[label]) for other in names] for label in names]
    critical_difference_diagram(
        {names[label]: rank for label, rank in ranking.ranks.items()},
        pandas.DataFrame(tied, index=list(names.values()), columns=list(names.values())),
        ax=axes,
        label_fmt_left="{label} ({rank:.2f})",
        label_fmt_right="({rank:.2f}) {label}",
        label_props={"fontsize": "small", "parse_math": False},
        elbow_props={"color": "black", "linewidth": 0.8, "clip_on": False},
        marker_props={"s": 16, "clip_on": False},
        crossbar_props={"color": "C0", "linewidth": 3},
    )
    end = 1 + ranking.distance
    axes.set_xlim(1, max(len(ranking.ranks), end))
    axes.plot([1, end], [1.4, 1.4], color="black", marker="|", linewidth=1, clip_on=False)  # above the numbers
    axes.text((1 + end) / 2, 1.5, f"critical difference {ranking.distance:.2f}", ha="center", va="bottom", size="small")
    said = textwrap.fill(CONTROL.sub("?", ranking.said()), 130)
    axes.text(0, -0.02, said, transform=axes.transAxes, va="top", fontsize="x-small", parse_math=False)


def short_names(labels: Mapping[str, float] | Sequence[str], letters: int) -> dict[str, str]:
    """Names of so many letters, on one line; those that would be equal get a number."""
    names: dict[str, str] = {}
    for label in labels:
        line = CONTROL.sub("?", " ".join(label.split()))
        name = short = line if len(line) <= letters else f"{line[: letters - 1]}…"
        number = 2
        while name in names.values():
            name, number = f"{short} ({number})", number + 1
        names[label] = name
    return names
