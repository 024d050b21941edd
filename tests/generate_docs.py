"""The generated parts of README.md and docs/, and README's picture: `make docs` writes them, a test keeps them fresh.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a function of `PARTS`.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from upcycle_bench import record
from upcycle_bench.cli import app
from upcycle_bench.cli.listing import rows
from upcycle_bench.planning.cluster_cost import bills
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.reporting import formats, leaderboard
from upcycle_bench.reporting.formats import markdown_table as table
from upcycle_bench.reporting.leaderboard import Board, SeedMean

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIGURE = ROOT / "docs" / "figures" / "strategies.svg"
MARK = re.compile(r"<!-- generated: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def folded(text: str) -> str:
    """The same Markdown in lines of at most 160 characters; rows of tables stay whole."""
    lines = []
    for line in text.splitlines():
        indent = "  " if line.startswith("- ") else ""
        whole = line.startswith("|") or not line
        lines += [line] if whole else textwrap.wrap(line, 160, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def mark(status: str, reconstructed: Sequence[str]) -> str:
    """What has to stand behind a name whose method is not all its paper's."""
    if status == "published":
        return "parts reconstructed" if reconstructed else ""
    return status if status == "reconstructed" else ""


def ours(kind: str) -> list[dict]:
    """What this package registers of a kind, as `upcycle-bench list` shows it."""
    return [row for row in rows(load_registry(), kind) if row["from"].startswith("upcycle-bench ")]


def names() -> str:
    """The strategies by their mark, a line each."""
    groups: dict[str, list[str]] = {}
    for row in ours("strategies"):
        kind = mark(row["status"], row["reconstructed"]) or row["status"]
        groups.setdefault(kind, []).append(f"`{row['name']}`")
    what = {
        "published": "a paper describes it",
        "parts reconstructed": "published, with parts that its paper leaves open",
        "reconstructed": "our reading of what little is published",
        "control": "what a gain has to be compared with",
    }
    return folded("\n".join(f"- *{kind}* ({what[kind]}): {', '.join(groups[kind])}" for kind in what))


def strategies() -> str:
    """Name, what it does, status; the paper stands in its section."""
    lines = []
    for row in ours("strategies"):
        kinds = dict.fromkeys([row["status"], mark(row["status"], row["reconstructed"]) or row["status"]])
        lines.append([f"[`{row['name']}`](#{row['name']})", row["summary"], ", ".join(kinds)])
    return table(["strategy", "what it does", "status"], lines)


def details() -> str:
    """A section for every strategy: where its paper leaves something open, and its options."""
    sections = []
    for row in ours("strategies"):
        summary = row["summary"][:1].upper() + row["summary"][1:]
        link = f"[{row['paper']}]({row['url']})" if row["url"] else row["paper"]
        source = "Control" if row["status"] == "control" else f"{row['status'].capitalize()}: {link}"
        parts = [f"## `{row['name']}`", f"{summary}.\n{source}."]
        if row["reconstructed"]:
            parts.append("Not in the paper, chosen here:\n" + "\n".join(f"- {text}" for text in row["reconstructed"]))
        options = [
            [f"`{option['name']}`", f"`{option['default']}`", option["description"] or ""] for option in row["options"]
        ]
        parts += [table(["option", "default", "what it is"], options)] if options else []
        sections.append("\n\n".join(parts))
    return folded("\n\n".join(sections))


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
    return table(
        ["suite", "what it scores", "after"], [[f"`{r['name']}`", r["summary"], r["paper"]] for r in ours("suites")]
    )


def lab() -> Board:
    """The leaderboard of the records in results/lab."""
    (board,) = leaderboard.build([record.read(path) for path in record.record_paths(ROOT / "results" / "lab")])
    return board


def board() -> str:
    """The whole leaderboard of results/lab, as the command prints it."""
    shown = formats.render([lab()], "md")
    return folded(f"```console\n$ upcycle-bench leaderboard results/lab --format md\n```\n\n{shown.strip()}")


def estimated(each: SeedMean | None) -> str:
    """A mean with its half width, if it has one; `-` for the baseline's difference to itself."""
    if each is None:
        return "-"
    return f"{each.mean:.4f}" + ("" if each.half_width is None else f" ± {each.half_width:.4f}")


def results() -> str:
    """The columns of the leaderboard that a reader needs first."""
    shown = lab()
    lines = []
    for row in shown.rows:
        estimates = [estimated(each) for each in (row.primary, row.difference)]
        cost = f"{row.charged_flops or 0:.2e}"
        lines.append([row.title, str(row.primary.n if row.primary else 0), *estimates, cost])
    return table(["strategy", "seeds", "primary score", f"minus `{shown.baseline}`", "charged FLOPs"], lines)


def caption() -> str:
    """What the picture shows, in words: its description within the file."""
    differences = {row.title: row.difference for row in lab().rows}
    return "; ".join(f"{title}: {estimated(each)} (n={each.n})" for title, each in differences.items() if each)


def draw(path: Path = FIGURE) -> None:
    """Each strategy's difference to the baseline over training seeds, with its interval, as a small SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = lab()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "upcycle-bench", "font.size": 10}):
        figure = Figure(figsize=(8, 2.9), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="grey", linewidth=1)
        for place, row in enumerate(reversed(shown.rows)):
            colour = "grey" if row.kind.startswith("control") else "C0"
            point = (row.difference.mean, row.difference.half_width or 0) if row.difference else (0.0, 0.0)
            axes.errorbar(point[0], place, xerr=point[1] or None, fmt="o", capsize=4, color=colour)
        axes.set_yticks(range(len(shown.rows)), [row.title for row in reversed(shown.rows)])
        axes.margins(y=0.12)
        figure.supxlabel(f"primary score minus that of {shown.baseline}; bars: 95 % over training seeds", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": caption()})


def all_suites() -> str:
    """What the optional suites say of the records in results/lab-suites; strata and single layers left out."""
    runs = [record.read(path) for path in record.record_paths(ROOT / "results" / "lab-suites")]
    titles = {
        run.strategy.label: f"`{run.strategy.label}`"
        + (f" ({kind})" if (kind := mark(run.strategy.status, run.strategy.reconstructed)) else "")
        for run in runs
    }
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
    labels = sorted(titles, key=lambda label: (label != "dense", label))
    lines = [
        [f"`{suite}`", f"`{name}`", f"`{metric}`", row["chance"], *(row.get(label, "") for label in labels)]
        for (suite, name, metric), row in values.items()
    ]
    return table(["suite", "of", "metric", "chance", *(titles[label] for label in labels)], lines)


def cluster() -> str:
    """What the published protocols would take on 64 GPUs, by `upcycle_bench.planning.cluster_cost`."""
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
    "results": results,
    "names": names,
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
    draw()
    for document in DOCUMENTS:
        document.write_text(generate(document.read_text()))
