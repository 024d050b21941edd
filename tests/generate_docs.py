"""The generated parts of README.md and docs/, and README's picture: `make docs` writes them, a test keeps them fresh.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a function of `PARTS`.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from tests.reporting.tampering import TAMPERED
from upcycle_bench.cli import app
from upcycle_bench.cli.listing import rows
from upcycle_bench.data.bad_samples import KINDS as KINDS_BAD
from upcycle_bench.data.pair_index import KINDS as KINDS_LEFT_OUT
from upcycle_bench.data.shards import NO_ARCHIVE
from upcycle_bench.model import config, pretrained
from upcycle_bench.model.checkpoint_file import KINDS
from upcycle_bench.model.misfit import REASONS
from upcycle_bench.model.said import SAYERS
from upcycle_bench.model.upcyclable import UNFIT
from upcycle_bench.planning.cluster_cost import bills
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.reporting import formats, leaderboard
from upcycle_bench.reporting.board import Board, SeedMean
from upcycle_bench.reporting.collect import collect
from upcycle_bench.reporting.expected_curves import FILE, stored_of
from upcycle_bench.reporting.formats import markdown_table as table
from upcycle_bench.reporting.validate import CHECKS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIGURE = ROOT / "docs" / "figures" / "strategies.svg"
CURVES = ROOT / "upcycle_bench" / "assets" / FILE
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
    found = collect([ROOT / "results" / "lab"])
    boards = leaderboard.build(found.records, found.outcomes)
    (board,) = [each for each in boards if each.division == "closed" and [*each.suite_fingerprints] == ["zero-shot"]]
    return board


def board() -> str:
    """The leaderboard of results/lab, as the command prints it in 80 columns."""
    shown = formats.render([lab()], "terminal", 80)
    return f"```console\n$ upcycle-bench leaderboard results/lab\n{shown.strip()}\n```"


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
        found = [row.headlines.get(name) for name in shown.headlines]
        pairs = [(estimated(each.mean), estimated(each.difference)) if each else ("", "") for each in found]
        cost = "" if row.charged_flops is None else f"{row.charged_flops:.2e}"
        lines.append([row.title, str(row.seeds), *(cell for pair in pairs for cell in pair), cost])
    heads = [head for name in shown.headlines for head in (name, f"minus `{shown.baseline}`")]
    chance = ["*chance*", "", *(c for h in shown.headlines.values() for c in (f"{h.chance:.4f}", "")), ""]
    return table(["strategy", "seeds", *heads, "charged FLOPs"], [*lines, chance])


def caption() -> str:
    """What the picture shows, in words: its description within the file."""
    return "; ".join(
        f"{row.title}, {name}: {estimated(headline.difference)} (n={headline.difference.n})"
        for row in lab().rows
        for name, headline in row.headlines.items()
        if headline.difference
    )


def draw(path: Path = FIGURE) -> None:
    """Each strategy's difference to the baseline over training seeds, with its interval, as a small SVG.

    A panel for each headline score, with the better side on the right.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = lab()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "upcycle-bench", "font.size": 10}):
        rows = [row for row in reversed(shown.rows) if row.headlines]
        figure = Figure(figsize=(9, 1.3 + 0.3 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(shown.headlines), sharey=True, squeeze=False)[0]
        for axes, (name, headline) in zip(panels, shown.headlines.items(), strict=True):
            axes.axvline(0, color="grey", linewidth=1)
            for place, row in enumerate(rows):
                colour = "grey" if row.kind.startswith("control") else "C0"
                own = SeedMean(0.0, None, 0) if row.label == shown.baseline else None
                difference = row.headlines[name].difference or own
                if difference is None:  # no seed in common with the baseline
                    continue
                axes.errorbar(difference.mean, place, xerr=difference.half_width, fmt="o", capsize=4, color=colour)
            if not headline.higher_is_better:
                axes.invert_xaxis()
            axes.set_title(f"{name} (right is better)", fontsize=10)
            axes.set_yticks(range(len(rows)), [row.title for row in rows])
            axes.margins(y=0.12)
            axes.spines[["top", "right", "left"]].set_visible(False)
        figure.supxlabel(f"score minus that of {shown.baseline}; bars: 95 % over training seeds", fontsize=10)
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": caption()})


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


def checkpoints() -> str:
    """What a file of weights can be, how it is told, and what happens: the rows of `checkpoint_file`."""
    lines = [[kind.name, kind.told_by, kind.remedy or "is read"] for kind in KINDS]
    return table(["the file is", "told by", "what happens, or what to do"], lines)


def models() -> str:
    """The ways to name a model, and the files that describe one: the rows of `config`."""
    doors = "\n".join(f"- {door.what}" for door in config.DOORS)
    return folded(f"{doors}\n\nA model is described by\n\n" + "\n".join(f"- {row.what}" for row in config.FORMATS))


def weights() -> str:
    """The ways to name weights: the rows of `pretrained`."""
    return folded("\n".join(f"- {door.what}" for door in pretrained.DOORS))


def sayers() -> str:
    """What may say something of a file of weights: the rows of `said`."""
    return folded("\n".join(f"- {sayer.what}" for sayer in SAYERS))


def misfits() -> str:
    """What weights that do not fit may be: the rows of `misfit`."""
    return table(["the file holds", "what to do"], [[reason.what, reason.remedy] for reason in REASONS])


def unfit() -> str:
    """What a configuration may have that stands in the way of upcycling, or of training: the rows of `upcyclable`."""
    lines = [[row.what, "`run`" if row.trained else "`upcycle`, `run`", row.remedy] for row in UNFIT]
    return table(["a model with", "is refused by", "what to do"], lines)


def left_out() -> str:
    """The kinds of training samples that are left out: the rows of `pair_index`."""
    return table(["left out", "why"], [[kind, why] for kind, why in KINDS_LEFT_OUT.items()])


def bad_samples() -> str:
    """The kinds of samples that a training replaces."""
    return table(["bad sample", "what it is"], [[kind, what] for kind, what in KINDS_BAD.items()])


def no_archive() -> str:
    """What a file may be that is no tar archive: the rows of `shards`."""
    return table(["a shard", "what to do"], [[what.removeprefix("it "), remedy] for _, what, remedy in NO_ARCHIVE])


def checks() -> str:
    """The checks of `validate`."""
    return table(["check", "what must be so"], [[f"`{name}`", check.what] for name, check in CHECKS.items()])


def tampered() -> str:
    """What the tests do to sound records, and the check that catches it."""
    return table(["what was done", "caught by"], [[each.what, f"`{each.check}`"] for each in TAMPERED])


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
    "checkpoints": checkpoints,
    "models": models,
    "weights": weights,
    "sayers": sayers,
    "misfits": misfits,
    "left-out": left_out,
    "bad-samples": bad_samples,
    "no-archive": no_archive,
    "unfit": unfit,
    "checks": checks,
    "tampered": tampered,
}


def generate(text: str) -> str:
    """The same text with every generated part made anew."""
    return MARK.sub(lambda m: f"<!-- generated: {m[1]} -->\n{PARTS[m[1]]()}\n<!-- end -->", text)


def reference_curves() -> str:
    """The curves of held-out pairs that ship with the package, of the records in results/."""
    return stored_of(collect([ROOT / "results" / "lab"]).records).model_dump_json(indent=1)


if __name__ == "__main__":
    draw()
    CURVES.write_text(reference_curves() + "\n")
    for document in DOCUMENTS:
        document.write_text(generate(document.read_text()))
