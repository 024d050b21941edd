"""Disturb runs on purpose, and write the table fault x phase x ranks with its outcomes.

    python -m tests.chaos --markdown docs/notes/chaos.md        # make chaos: about an hour on two cores
    python -m tests.chaos --kills 0 --only "full disk"

The status is 1 where an outcome is not what it should be. A full disk is tried on a file system of its own, which takes
the right to mount one.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.cases import Baseline, Broken, all_cases, disturb, undisturbed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="kills at random seconds, for each number of ranks")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks")
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument("--markdown", type=Path, help="the file for the table")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        baselines: dict[int, Baseline] = {}
        for ranks in map(int, given.ranks.split(",")):
            baselines[ranks] = undisturbed(ranks, folder / f"baseline{ranks}")
            print(f"undisturbed, {ranks} ranks: {baselines[ranks].seconds:.0f} s", flush=True)
        for number, case in enumerate(all_cases(given.kills, baselines)):
            if given.only not in case.name:
                continue
            began = time.monotonic()
            try:
                outcome = disturb(case, baselines[case.ranks], folder / f"case{number}")
            except (Broken, RuntimeError) as error:
                outcome = f"BROKEN: {error}"
            rows.append((case, outcome))
            print(f"{case.name}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    if given.markdown:
        given.markdown.write_text(table(rows))
    sys.exit(any(outcome.startswith("BROKEN") for _, outcome in rows))


def table(rows: list) -> str:
    """The outcomes as Markdown."""
    lines = [
        "# Runs that were disturbed on purpose",
        "",
        f"Made by `make chaos` on {platform.system()} {platform.machine()}, Python {platform.python_version()}.",
        "Each run was disturbed once, then the same command was typed until it ended.",
        "*Same bits*: its weights are those of the run that nothing disturbed.",
        "",
        "| fault | ranks | phase | outcome |",
        "| --- | --- | --- | --- |",
    ]
    for case, outcome in rows:
        phase = case.phase or f"second {case.second:.1f}"
        fault = case.fault + " by torchrun" * case.torchrun
        fault += f", then {case.then[0]} with ep_size {case.then[1]}" if case.then else ""
        lines.append(f"| {fault} | {case.ranks} | {phase} | {outcome.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
