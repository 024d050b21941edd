"""What commands print for people: tables and facts on stdout, by rich; the matrix on stderr while it runs.

Nothing here decides anything. Heavy imports stand inside the functions, since `--help` imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle_bench.planning.plan import Plan
    from upcycle_bench.planning_matrix import Cell
    from upcycle_bench.record import Record
    from upcycle_bench.run_many import Outcome
    from upcycle_bench.worlds import World


def show_plan(plan: Plan, as_json: bool) -> None:
    """A dry run: what would run and what it costs."""
    from upcycle_bench.costs import estimate, estimate_seconds
    from upcycle_bench.engine import choose_device

    device = choose_device()
    costs = estimate(plan.protocol, plan.strategy)
    flops = costs.train_flops + costs.prepare_flops_at_most
    seconds = estimate_seconds(plan.protocol, flops, device) if flops else 0.0
    facts: dict[str, Any] = {
        "strategy": plan.label,
        "protocol": plan.protocol.name,
        "division": plan.division,
        **({"open_because": plan.unequal} if plan.unequal else {}),
        "overrides": list(plan.protocol.overrides),
        "seeds": {"init": plan.init_seed, "train": plan.train_seed},
        "training_fingerprint": plan.training_fingerprint,
        "suite_fingerprints": plan.suite_fingerprints,
        **({"skipped": plan.skipped} if plan.skipped else {}),
        "blocks_replaced": list(costs.layers),
        **({"experts": plan.moe.experts, "top_k": plan.moe.top_k} if costs.layers else {}),
        "parameters_total": costs.parameters_total,
        "parameters_active": costs.parameters_active,
        "steps": costs.steps,
        "samples": costs.samples,
        "peak_learning_rate": plan.protocol.peak_lr,
        "calibration_pairs": plan.strategy.calibration_pairs,
        "forward_flops_per_pair": costs.forward_flops,
        "training_flops_without_strategy_loss": costs.train_flops,
        **({"preparation_flops_at_most": costs.prepare_flops_at_most} if costs.prepare_flops_at_most else {}),
        "estimated_training_seconds_on_one_such_device": round(seconds, 1),
        "missing": list(plan.missing),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table("dry run", [{"what": key.replace("_", " "), "is": _plain(value)} for key, value in facts.items()])


def _plain(value: Any) -> str:
    if value is None:
        return "open until everything is given"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, int) and value >= 10**12:
        return f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def show_record(made: Record, path: Path) -> None:
    """Scores and cost of a run, and where its files are."""
    from upcycle_bench.suite import AVERAGE
    from upcycle_bench.uncertainty import of_scores

    assert made.cost is not None and made.primary is not None
    averaged = any(score.dataset == AVERAGE for score in made.scores)
    seeds = made.seeds
    title = f"{made.strategy.label}, protocol {made.protocol.name}, seeds {seeds.init} and {seeds.train}"
    show_scores(title, [score.model_dump() for score in made.scores])
    show_skipped(made.skipped)
    primaries = sum(score.primary for score in made.scores)
    rest = f"; all {len(made.scores)} scores, strata included, stand in the record" if averaged else ""
    error = of_scores((score.dataset, score.metric, score.standard_error) for score in made.scores if score.primary)
    mean_of = f", the mean of {primaries} scores" if primaries > 1 else ""
    print(f"primary: {_value(made.primary, error)}{mean_of}{rest}")
    cost = made.cost
    parts = [f"{name} {phase.seconds:.1f} s" for name, phase in cost.phases.items()]
    parts.append(f"{cost.parameters_total:,} parameters, {cost.parameters_active:,} active")
    if cost.samples_per_second:
        parts.append(f"{cost.samples_per_second:,.0f} samples/s")
    if cost.tokens_dropped is not None:
        parts.append(f"{cost.tokens_dropped:.1%} of choices dropped")
    print("; ".join(parts))
    show_certificate(made.certificate.model_dump() if made.certificate else None)
    from upcycle_bench.cache import cache_root

    print(f"weights: {cache_root() / 'weights' / f'{made.hashes.weights}.safetensors'}")
    print(f"record: {path}")


def show_scores(title: str, scores: Sequence[Mapping[str, Any]]) -> None:
    """A table for each suite, and what the signs in them mean; of a suite with averages these only, without strata."""
    suites = list(dict.fromkeys(score["suite"] for score in scores))
    if len(suites) > 1:
        print(f"{title}\n")
    shown = []
    for suite in suites:
        rows = score_rows([score for score in scores if score["suite"] == suite])
        heads = {"value": "value (± SE)"} if any("±" in row["value"] for row in rows) else {}
        table(suite if len(suites) > 1 else title, [{heads.get(key, key): row[key] for key in row} for row in rows])
        shown += rows
    show_key(shown)


def score_rows(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The lines of one suite's table."""
    from upcycle_bench.suite import AVERAGE

    averaged = any(score["dataset"] == AVERAGE for score in scores)
    return [
        {
            "dataset": score["dataset"],
            "metric": score["metric"] + (" (primary)" if score["primary"] else ""),
            "value": _value(score["value"], score["standard_error"], score["interval"]),
            "chance": "" if score["chance"] is None else f"{score['chance']:.4f}",
            "n": f"{score['samples']:,}",
        }
        for score in scores
        if not averaged or (score["dataset"] == AVERAGE and "[" not in score["metric"])
    ]


def _value(value: float, error: float | None, interval: Sequence[float] | None = None) -> str:
    """With its standard error; of a share of 0 or 1, where that is 0, with the other end of its interval."""
    if error == 0 and interval is not None and interval[0] < interval[1]:
        return f"{value:.4f} " + (f"[≥{interval[0]:.3f}]" if value > interval[0] else f"[≤{interval[1]:.3f}]")
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def show_key(rows: Sequence[Mapping[str, str]]) -> None:
    """What the signs in a table of scores mean."""
    if any("±" in row["value"] for row in rows):
        print("±, SE: one standard error, over evaluation samples (where a suite draws several times, over its draws)")
    if any("[" in row["value"] for row in rows):
        print("[≥a], [≤b]: the end of the 95 % interval, where that error is 0")


def show_certificate(proof: Mapping[str, Any] | None) -> None:
    """What an evaluation's certificate says, and what it leaves out, in the terminal's width."""
    import textwrap

    from rich.console import Console

    text = "none; no suite let the model be watched" if proof is None else "; ".join(_certified(proof))
    width = Console().width
    print(textwrap.fill(f"certificate: {text}", width, subsequent_indent="  ", break_on_hyphens=False))


def _certified(proof: Mapping[str, Any]) -> Iterator[str]:
    sizes = " and ".join(str(repeat["batch_size"]) for repeat in proof["repeats"])
    differing = sum(repeat["differing"] for repeat in proof["repeats"])
    same = f"{differing} differ, by a tie of experts" if differing else "the same"
    yield f"{proof['predictions']:,} predictions again in batches of {sizes}, the last in another order: {same}"
    if proof["choices_routed"]:
        yield f"0 of {proof['choices_routed']:,} choices of tokens dropped"
    for control in proof["controls"]:
        yield (
            f"labels of {control['dataset']} shuffled: {control['metric']} {control['value']:.4f}, chance "
            f"{control['chance']:.4f} on {control['samples']} samples"
        )
    if proof["controls"]:
        yield "these are balanced subsets with fewer classes or captions, so their chance is not the tables'"
    if proof["uncontrolled"]:
        yield f"not controlled: {proof['uncontrolled'].rstrip('.')}"
    if proof["uncovered"]:
        yield f"not covered: the fine-tuned copies that {proof['uncovered']} scores"
    yield "weights unchanged"
    yield f"{proof['seconds']:.1f} s"


def show_skipped(skipped: Mapping[str, str]) -> None:
    """What did not run, and why: each reason once."""
    for reason in dict.fromkeys(skipped.values()):
        names = ", ".join(name for name, why in skipped.items() if why == reason)
        print(f"skipped: {names}: {reason}")


def show_world(world: World, built: bool, as_json: bool) -> None:
    """What is in a data set, by its manifest."""
    from upcycle_bench.protocol import flatten
    from upcycle_bench.worlds import MANIFEST

    folder = world.eval_root.parent
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del manifest["files"]
    if as_json:
        print(json.dumps({**manifest, "folder": str(folder), "sha256": world.sha256}, indent=2))
        return
    counts = manifest["counts"]
    # The lab's counts are those of icons in each split, and with "set " before them those of what was written.
    sets = {key.removeprefix("set "): n for key, n in counts.items() if key.startswith("set ")} or counts
    rows = {"training pairs": sets["train"]}
    rows |= {f"evaluation set {name}": n for name, n in sets.items() if name != "train"}
    rows |= {f"removed: {key.replace('.', ' ', 1)}": n for key, n in flatten(manifest.get("removed", {})).items()}
    rows |= {"classes": manifest["classes"]} if "classes" in manifest else {}
    title = f"{world.name}, just built" if built else f"{world.name}, in the cache already; every file was checked"
    table(title, [{"what": key, "count": f"{value:,}"} for key, value in rows.items()])
    print(f"folder: {folder}")


def show_dense(path: Path, trained: bool, output: Path | None, half: str | None, as_json: bool) -> None:
    """A dense model of the cache, by the .json beside it; `half`: sha256 of its half-precision copy `output`."""
    facts = json.loads(path.with_suffix(".json").read_text())
    if as_json:
        copy = {"output": str(output), "output sha256": half} if output else {}
        print(json.dumps({**facts, "checkpoint": str(path), "trained": trained, **copy}, indent=2))
        return
    steps = facts["samples"] // facts["dense"]["schedule"]["batch_size"]
    loss, seconds = facts["last metrics"].get("loss", float("nan")), facts["cost"]["seconds"]
    if not trained:
        print(f"in the cache already, from {facts['created']}; nothing was trained")
    print(f"dense model of {facts['protocol']}: {steps:,} steps, last loss {loss:.4f}, {seconds:,.1f} s")
    print(f"sha256: {facts['sha256']}")
    print(f"checkpoint: {path}")
    if output:
        print(f"half precision: {output}, sha256 {half}")


def show_matrix(cells: Sequence[Cell], done: Sequence[Path | None], *, stderr: bool = True) -> None:
    """A row per strategy, a column per seed: what is done and what is to do."""
    rows: dict[str, dict[str, str]] = {}
    for cell, path in zip(cells, done, strict=True):
        row = rows.setdefault(cell.strategy, {"strategy": cell.strategy})
        row[f"seed {cell.seed}"] = "to do" if path is None else "done"
    table(f"protocol {cells[0].plan.protocol.name}", list(rows.values()), stderr=stderr)


def show_preview(cells: Sequence[Cell], done: Sequence[Path | None], flops: int, seconds: float, as_json: bool) -> None:
    """A dry run of several cells; cost is that of those to do."""
    facts = {
        "runs": len(cells),
        "to_do": sum(path is None for path in done),
        "flops_without_strategy_losses": flops,
        "estimated_training_seconds_on_one_such_device": round(seconds, 1),
        "missing": list(cells[0].plan.missing),
    }
    if as_json:
        rows = [
            {**_identity(cell), "done": path is not None, "record": str(path) if path else None}
            for cell, path in zip(cells, done, strict=True)
        ]
        print(json.dumps({**facts, "matrix": rows}, indent=2))
        return
    show_matrix(cells, done, stderr=False)
    table("dry run", [{"what": key.replace("_", " "), "is": _plain(value)} for key, value in facts.items()])


def show_outcomes(outcomes: Sequence[Outcome], as_json: bool) -> None:
    """What became of the cells, strategy by strategy: with --json one document, else a table."""
    strategies = [outcome.cell.strategy for outcome in outcomes]
    outcomes = sorted(outcomes, key=lambda outcome: strategies.index(outcome.cell.strategy))
    rows = []
    for outcome in outcomes:
        made = outcome.made
        train = made.cost.phases.get("train") if made and made.cost else None
        rows.append(
            {
                **_identity(outcome.cell),
                "status": "failed" if outcome.reason else "ok",
                "ran": outcome.ran,
                "primary": made.primary if made else None,
                "train_seconds": train.seconds if train else None,
                "record": str(outcome.path) if outcome.path else None,
                "reason": outcome.reason,
            }
        )
    if as_json:
        print(json.dumps({"runs": rows}, indent=2))
        return
    shown = [
        {
            "strategy": row["strategy"],
            "seed": outcome.cell.seed,
            "primary": "failed" if row["primary"] is None else f"{row['primary']:.4f}",
            "train s": "" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}",
            "status": row["status"],
        }
        for row, outcome in zip(rows, outcomes, strict=True)
    ]
    table(f"protocol {outcomes[0].cell.plan.protocol.name}", shown)
    for row, outcome in zip(rows, outcomes, strict=True):  # whole, so that they can be copied
        print(f"{row['strategy']}, seed {outcome.cell.seed}: {row['reason'] or row['record'] or ''}")


def _identity(cell: Cell) -> dict[str, Any]:
    plan = cell.plan
    return {"strategy": plan.label, "seeds": {"init": plan.init_seed, "train": plan.train_seed}}


def show_listing(kind: str, entries: Sequence[dict[str, Any]]) -> None:
    """What `list` prints: papers without their arXiv numbers, and who brings them in the title if it is one for all."""
    hidden = {"url", "reconstructed", "options", "sources"}
    owners = {entry["from"] for entry in entries}
    if len(owners) == 1:
        kind, hidden = f"{kind} from {owners.pop()}", hidden | {"from"}
    rows = [{key: value for key, value in entry.items() if key not in hidden} for entry in entries]
    table(kind, [{key: value.split(", arXiv")[0] for key, value in row.items()} for row in rows])


def table(title: str, rows: Sequence[dict[str, str]], *, stderr: bool = False) -> None:
    """Rows with the same keys, which head the columns."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape  # `cluster-aware[tau=0.8]` is no markup
    from rich.table import Table

    # On a narrow terminal these are folded, so that no digit of the others is cut off.
    wide = ("summary", "paper", "is", "from", "holds", "record or reason", "suite", "dataset", "metric")
    made = Table(
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for column in rows[0] if rows else ["none"]:
        made.add_column(column, overflow="fold", no_wrap=column not in wide)
    for row in rows:
        made.add_row(*map(escape, row.values()))
    show(Group(made, ""), stderr=stderr)


def show(renderable: Any, *, stderr: bool = False) -> None:
    """Print what rich can render."""
    from rich.console import Console

    Console(highlight=False, stderr=stderr).print(renderable)
