"""The matrix of strategies by seeds under one protocol: its cells, which of them are done, and what the rest costs.

    cells = list(enumerate_cells(plans, seed_pairs(seed=0, count=3)))
    done = finished_before(cells, results)                          # for each cell its record, or None
    flops, seconds = cost_of(cells)

Nothing is trained here; `run_many` runs the cells that have no record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from upcycle_bench import record
from upcycle_bench.planning.estimate import estimate, estimate_seconds
from upcycle_bench.planning.identity import same_dense, trained_on, with_dense
from upcycle_bench.planning.plan import Plan, dense_source, run_id
from upcycle_bench.planning.registry import Registry
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError

SeedPair = tuple[int, int]  # of initialisation, of training
Records = Mapping[Path, record.Record]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the matrix."""

    plan: Plan

    @property
    def strategy(self) -> str:
        """The row: the label of the strategy, or the one of its tuned row."""
        return self.plan.row

    @property
    def seed(self) -> str:
        """The column: `0`, or `0/1` where initialisation and training have different seeds."""
        init, train = self.plan.init_seed, self.plan.train_seed
        return str(init) if init == train else f"{init}/{train}"


def strategy_names(registry: Registry, text: str) -> list[str]:
    """The names in `a,b,c`; of `all`, every registered strategy, controls first.

    Raises UserError for a name that is unknown or given twice.
    """
    if text == "all":
        strategies = registry.strategies
        return sorted(strategies, key=lambda name: (strategies[name].target.info.status != "control", name))
    names = [name.strip() for name in text.split(",")]
    if "all" in names:
        raise UserError(f"--strategy {text}: 'all' stands alone; it names every strategy.")
    for name in names:
        registry.get("strategy", name)
        if names.count(name) > 1:
            raise UserError(f"--strategy names {name} twice; every strategy is one row.")
    return names


def seed_pairs(seed: int, count: int, init_seed: int | None = None, train_seed: int | None = None) -> list[SeedPair]:
    """`count` pairs of seeds from (`seed`, `seed`) on; `init_seed` or `train_seed`, where given, stays the same.

    Raises UserError where both are given and `count` > 1.
    """
    if count > 1 and init_seed is not None and train_seed is not None:
        raise UserError(f"--seeds {count} leaves nothing to vary; give --init-seed or --train-seed, not both.")
    return [
        (number if init_seed is None else init_seed, number if train_seed is None else train_seed)
        for number in range(seed, seed + count)
    ]


def enumerate_cells(plans: Sequence[Plan], seeds: Iterable[SeedPair]) -> Iterator[Cell]:
    """All cells, seed by seed, so that of a matrix that is stopped early each finished seed compares all strategies."""
    for init, train in seeds:
        for plan in plans:
            yield Cell(plan=replace(plan, init_seed=init, train_seed=train))


def newest_record(cell: Cell, run_id: str, records: Records) -> Path | None:
    """The newest record that this cell would make again, or None; found by content, since files may be renamed."""
    fitting = [
        (made.created_at, path)
        for path, made in records.items()
        if made.status == "ok" and made.run_id == run_id and describes(made, cell) and _complete(made, cell)
    ]
    return max(fitting)[1] if fitting else None


def describes(made: record.Record, cell: Cell) -> bool:
    """Whether a record belongs to this cell: strategy, tuning, protocol, fingerprints, seeds; of a failed run too."""
    protocol = made.protocol
    plan = cell.plan.as_built(protocol.unequal)  # what the model costs is known only when it is built
    plan = trained_on(plan, made.sessions or ())
    return (
        (made.strategy.label, made.strategy.tuned) == (plan.row, plan.tuned)
        and (protocol.name, made.division) == (plan.protocol.name, plan.division)
        and protocol.training_fingerprint == plan.training_fingerprint
        and protocol.suite_fingerprints.items() <= plan.suite_fingerprints.items()
        and plan.suite_fingerprints.keys() - protocol.suite_fingerprints.keys() <= made.skipped.keys()
        and (made.seeds.init, made.seeds.train) == (plan.init_seed, plan.train_seed)
    )


def _complete(made: record.Record, cell: Cell) -> bool:
    """Whether the record has every suite of this cell, none skipped."""
    return made.protocol.suite_fingerprints == cell.plan.suite_fingerprints


def read_records(results: Path, known: Collection[Path] = ()) -> dict[Path, record.Record]:
    """The records below `results`, without the paths in `known`. Files that are no records are passed over."""
    found = {}
    for path in sorted(set(results.rglob("*.json")) - set(known)):
        with contextlib.suppress(UserError):
            found[path] = record.read(path)
    return found


def finished_before(cells: Sequence[Cell], results: Path, known: Collection[Path] = ()) -> list[Path | None]:
    """For each cell the record of a finished run that is not among the `known` ones, or None.

    No run can be known without its dense model's file.

    Of a protocol that trains its own dense model, a run counts whose model was trained on other ranks or machines, or
    with other versions, too: one that went on here has such a model.
    """
    records, own = read_records(results, known), dict[str, str | None]()
    if not records:
        return [None] * len(cells)
    found = []
    for cell in cells:
        plan = cell.plan
        if (name := str(plan.dense_identity)) not in own:
            source = dense_source(plan)
            own[name] = source.identity() if source.file.is_file() else None
        models = {**same_dense(plan), **({name: digest} if (digest := own[name]) else {})}
        variants = [(with_dense(plan, recipe) if recipe != name else plan, sha256) for recipe, sha256 in models.items()]
        made = [newest_record(Cell(plan=each), run_id(each, sha256), records) for each, sha256 in variants]
        found.append(max(filter(None, made), key=lambda path: records[path].created_at, default=None))
    return found


def preview(cells: Sequence[Cell], results: Path, fresh: bool) -> list[Path | None]:
    """`finished_before` for a dry run, which trains no dense model."""
    return [None] * len(cells) if fresh or cells[0].plan.missing else finished_before(cells, results)


def flops_of(cells: Sequence[Cell]) -> dict[str, tuple[int, int]]:
    """FLOPs of each strategy's preparation (at most) and training, by its label; its own losses are not counted."""
    strategies = {cell.strategy: cell.plan.strategy for cell in cells}
    made = {label: estimate(cells[0].plan.protocol, strategy) for label, strategy in strategies.items()}
    return {label: (costs.prepare_flops_at_most, costs.train_flops) for label, costs in made.items()}


def cost_of(cells: Sequence[Cell]) -> tuple[int, float]:
    """FLOPs of all cells, as `flops_of` counts them, and the seconds they take on one device like this one."""
    each = flops_of(cells)
    flops = sum(sum(each[cell.strategy]) for cell in cells)
    return flops, estimate_seconds(cells[0].plan.protocol, flops, distributed.choose_device()) if flops else 0.0
