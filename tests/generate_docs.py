"""The generated parts of README.md and three files of docs/: `make docs` writes them, a test keeps them fresh.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a function of `PARTS`.
"""

import re
from collections.abc import Callable
from pathlib import Path

import typer

from upcycle_bench import formats, leaderboard, record
from upcycle_bench.cli import app
from upcycle_bench.cli.listing import rows
from upcycle_bench.cluster import bills
from upcycle_bench.formats import markdown_table as table
from upcycle_bench.protocol import load_protocol
from upcycle_bench.registry import load_registry

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("strategies.md", "performance.md", "lab.md"))]
MARK = re.compile(r"<!-- generated: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def strategies() -> str:
    """Name, what it does, paper, status."""
    own = [row for row in rows(load_registry(), "strategies") if row["from"].startswith("upcycle-bench ")]
    return table(
        ["strategy", "what it does", "paper", "status"],
        [[f"`{row['name']}`", row["summary"], row["paper"], row["status"]] for row in own],
    )


def details() -> str:
    """A section for every strategy: where its paper leaves something open, and its options."""
    sections = []
    for row in rows(load_registry(), "strategies"):
        if not row["from"].startswith("upcycle-bench "):
            continue
        summary = row["summary"][:1].upper() + row["summary"][1:]
        link = f"[{row['paper']}]({row['url']})" if row["url"] else row["paper"]
        source = "Control" if row["status"] == "control" else f"{row['status'].capitalize()}: {link}"
        parts = [f"## `{row['name']}`", f"{summary}. {source}."]
        if row["reconstructed"]:
            parts.append("Not in the paper, chosen here:\n" + "\n".join(f"- {text}" for text in row["reconstructed"]))
        options = [
            [f"`{option['name']}`", f"`{option['default']}`", option["description"] or ""] for option in row["options"]
        ]
        parts += [table(["option", "default", "what it is"], options)] if options else []
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


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


def suites() -> str:
    """Name, what it scores, paper."""
    own = [row for row in rows(load_registry(), "suites") if row["from"].startswith("upcycle-bench ")]
    return table(["suite", "what it scores", "after"], [[f"`{r['name']}`", r["summary"], r["paper"]] for r in own])


def board() -> str:
    """The leaderboard of the records in results/lab, as the command prints it."""
    folder = ROOT / "results" / "lab"
    shown = formats.render(leaderboard.build([record.read(path) for path in record.record_paths(folder)]), "md")
    return f"```console\n$ upcycle-bench leaderboard results/lab --format md\n```\n\n{shown.strip()}"


def all_suites() -> str:
    """What the optional suites say of the records in results/lab-suites; strata and single layers left out."""
    runs = [record.read(path) for path in record.record_paths(ROOT / "results" / "lab-suites")]
    values: dict[tuple[str, str, str], dict[str, str]] = {}
    for run in sorted(runs, key=lambda run: run.strategy.label):
        for score in run.scores:
            agreement = score.metric in ("nmi_class", "nmi_set") and "." not in score.dataset
            pairs = score.suite == "compositional" and score.dataset == "average" and "[" not in score.metric
            single = (
                score.suite in ("few-shot", "linear-probe", "fine-tune", "out-of-domain") and score.metric == "acc1"
            )
            if agreement or pairs or single:
                row = values.setdefault((score.suite, score.dataset, score.metric), {})
                chance = f"{score.chance:.3f}"
                row["chance"] = "" if agreement else chance
                beside = f" (chance {chance})" if agreement else f" ± {score.standard_error:.3f}"
                row[run.strategy.label] = f"{score.value:.3f}{beside}"
    labels = sorted({run.strategy.label for run in runs}, key=lambda label: (label != "dense", label))
    lines = [
        [f"`{suite}`", f"`{name}`", f"`{metric}`", row["chance"], *(row.get(label, "") for label in labels)]
        for (suite, name, metric), row in values.items()
    ]
    return table(["suite", "of", "metric", "chance", *(f"`{label}`" for label in labels)], lines)


def cluster() -> str:
    """What the published protocols would take on 64 GPUs, by `upcycle_bench.cluster`."""
    registry = load_registry()
    dense, sparse = (registry.get("strategy", name).target() for name in ("dense", "sparse-upcycling"))
    lines = []
    for name in ("clip-b32", "clip-b16"):
        for bill in bills(load_protocol(registry.get("protocol", name).target), dense, sparse):
            sizes = (bill.gradient_bytes, bill.feature_bytes, bill.exchange_bytes)
            cells = {
                "protocol": f"`{name}`",
                "training": bill.training,
                "ep_size": str(bill.ep_size),
                "samples": f"{bill.samples:.2e}",
                "FLOPs": f"{bill.flops:.2e}",
                "GPU-hours": f"{bill.gpu_hours:,.0f}",
                f"hours on {bill.cluster.gpus}": f"{bill.seconds / 3600:,.1f}",
                "a step computes, ms": f"{1e3 * bill.seconds / bill.steps:,.0f}",
                "gradients, features, all-to-all, GB": " + ".join(f"{size / 1e9:.2f}" for size in sizes),
                "a step sends, ms": f"{1e3 * bill.communication_seconds:,.0f}",
            }
            lines.append(list(cells.values()))
    return table(list(cells), lines)


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
    "details": details,
    "protocols": protocols,
    "suites": suites,
    "help": commands,
    "cluster": cluster,
    "all-suites": all_suites,
}


def generate(text: str) -> str:
    """The same text with every generated part made anew."""
    return MARK.sub(lambda m: f"<!-- generated: {m[1]} -->\n{PARTS[m[1]]()}\n<!-- end -->", text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(generate(document.read_text()))
