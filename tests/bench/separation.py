"""How well candidate scores tell the lab's controls apart: paired t over training seeds, from the outcomes of records.

    python -m tests.bench.separation results/lab-dev

The controls are known to differ: `sparse-upcycling` must be better than `dense`, and better than `drop-upcycling` that
re-draws three quarters of the weights. Every candidate is turned so that more is better.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from upcycle_bench import record
from upcycle_bench.reporting.formats import markdown_table
from upcycle_bench.util.errors import UserError

BASE = "sparse-upcycling"
CONTROLS = ("dense", "drop-upcycling[ratio=0.75]")
CANDIDATES: dict[str, Callable[[dict[str, np.ndarray], str], float]] = {
    "log-likelihood": lambda found, key: float(found[f"{key}log_likelihood"].mean()),
    "minus log rank": lambda found, key: -float(found[f"{key}log_rank"].mean()),
    "mean reciprocal rank": lambda found, key: float((1 / (1 + found[f"{key}rank"])).mean()),
    "top-1": lambda found, key: float((found[f"{key}rank"] < 1).mean()),
    "top-5": lambda found, key: float((found[f"{key}rank"] < 5).mean()),
}


def separation(folder: Path) -> str:
    """The table, in Markdown. Each cell is a mean difference to `BASE` over the seeds that both have, and its t."""
    runs: dict[str, dict[int, dict[str, np.ndarray]]] = defaultdict(dict)
    headlines: dict[str, set[str]] = defaultdict(set)  # headline -> prefixes of the outcomes of its parts
    for path in record.record_paths(folder):
        made = record.read(path)
        if made.status == "ok" and made.strategy.label in (BASE, *CONTROLS):
            runs[made.strategy.label][made.seeds.train] = record.read_outcomes(path)
            for score in made.scores:
                if score.headline:
                    way = score.metric.removesuffix("log_rank")
                    headlines[score.headline].add(f"{score.suite}/{score.dataset}/{way}")
    if not headlines:
        raise UserError(f"{folder}: no run of {', '.join((BASE, *CONTROLS))} with a headline score; run these first.")
    lines = []
    for headline, keys in headlines.items():
        for name, of_part in CANDIDATES.items():
            value = {
                label: {seed: float(np.mean([of_part(found, key) for key in keys])) for seed, found in seeds.items()}
                for label, seeds in runs.items()
            }
            cells = [paired(value.get(label, {}), value.get(BASE, {})) for label in CONTROLS]
            lines.append([f"{headline}: {name}", *cells])
    return markdown_table(["candidate score", *(f"{label} minus {BASE}" for label in CONTROLS)], lines)


def paired(values: dict[int, float], base: dict[int, float]) -> str:
    """Mean difference and Student's t over the common seeds; no t for fewer than two."""
    differences = np.array([values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())])
    if not len(differences):
        return ""
    mean = f"{differences.mean():+.4f}"
    if len(differences) < 2:
        return f"{mean} (n=1)"
    return f"{mean}, t {differences.mean() / (differences.std(ddof=1) / np.sqrt(len(differences))):.1f}"


def main(
    results: Annotated[Path, typer.Argument(help="Records of the controls, over several training seeds, in a folder.")],
) -> None:
    """Print how well candidate scores tell the lab's controls apart: mean difference, and t over training seeds."""
    try:
        print(separation(results))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    typer.run(main)
