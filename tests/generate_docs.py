"""The generated parts of README.md: `make docs` writes them, tests/test_docs.py fails while they are stale.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a function of `PARTS`.
"""

import re
from collections.abc import Callable
from pathlib import Path

import typer

from upcycle_bench import leaderboard, record
from upcycle_bench.cli import app
from upcycle_bench.listing import rows
from upcycle_bench.protocol import load_protocol
from upcycle_bench.registry import load_registry

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"<!-- generated: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [header, ["---"] * len(header), *lines]]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def strategies() -> str:
    """Name, what it does, paper, status."""
    own = [row for row in rows(load_registry(), "strategies") if row["from"].startswith("upcycle-bench ")]
    return table(
        ["strategy", "what it does", "paper", "status"],
        [[f"`{row['name']}`", row["summary"], row["paper"], row["status"]] for row in own],
    )


def protocols() -> str:
    """Name, model, training, summary."""
    lines = []
    for name, entry in load_registry().protocols.items():
        if entry.distribution == "upcycle-bench":
            protocol = load_protocol(entry.target)
            schedule = protocol.train.schedule
            training = f"{schedule.steps:,} steps of {schedule.batch_size:,}"
            lines.append([f"`{name}`", protocol.model, training, protocol.summary])
    return table(["protocol", "model", "training", "what it is"], lines)


def board() -> str:
    """The leaderboard of the records in results/smoke, as the command prints it."""
    folder = ROOT / "results" / "smoke"
    shown = leaderboard.render(leaderboard.build([record.read(path) for path in record.find(folder)]), "md")
    return f"```console\n$ upcycle-bench leaderboard results/smoke --format md\n```\n\n{shown.strip()}"


def commands() -> str:
    """Every command, and every option of `run`."""
    group = typer.main.get_command(app)
    lines = [[f"`upcycle-bench {name}`", command.help or ""] for name, command in group.commands.items()]  # type: ignore[attr-defined]
    run = group.commands["run"]  # type: ignore[attr-defined]
    options = [[", ".join(f"`{text}`" for text in option.opts), option.help or ""] for option in run.params]
    return f"{table(['command', 'what it does'], lines)}\n\n{table(['option of `run`', 'what it does'], options)}"


PARTS: dict[str, Callable[[], str]] = {
    "leaderboard": board,
    "strategies": strategies,
    "protocols": protocols,
    "help": commands,
}


def generate(text: str) -> str:
    """The same text with every generated part made anew."""
    return MARK.sub(lambda m: f"<!-- generated: {m[1]} -->\n{PARTS[m[1]]()}\n<!-- end -->", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(generate(readme.read_text()))
