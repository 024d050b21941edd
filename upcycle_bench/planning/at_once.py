"""How many runs at once `--jobs auto` stands for: by the cores, the memory and the GPUs that are free.

    number, why = choose(cells, Path("results"))    # 2, "4 cores / 2 threads each; 14 GB free / 5.3 GB each"

What a run takes is measured where `results` has records of the same strategy and protocol, and estimated elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upcycle_bench.planning.estimate import dense_activations, estimate, forward_flops
from upcycle_bench.planning.matrix import Cell, read_records
from upcycle_bench.protocol import Protocol
from upcycle_bench.strategy import Strategy
from upcycle_bench.util.capacity import free_memory, usable_cores, visible_gpus

BASE = 1_500_000_000  # bytes: the packages, the evaluation sets, and what the allocator keeps
STATE = 16  # bytes of a parameter: weight, gradient, two moments
# Times what the graph keeps: casts, matrices of attention, and the gradients on their way. The lab's records have 3.
ACTIVATIONS = 3


def choose(cells: Sequence[Cell], results: Path, processes: int = 1, gpus_each: int = 1) -> tuple[int, str]:
    """How many of the cells this machine can run at once, at least 1, and why, in a line.

    A run has so many `processes`, which share its threads, and uses so many GPUs, where there are some.
    """
    protocol = cells[0].plan.protocol
    cores, threads, gpus = usable_cores(), protocol.threads, len(visible_gpus())
    each, free = processes * max(_memory_of(cells, results, on_gpu=gpus > 0).values()), free_memory()
    limits = [int(cores / threads), int(free / each), *([gpus // gpus_each] if gpus and gpus_each else [])]
    why = [f"{_plural(cores, 'core')} / {_plural(threads, 'thread')} each"]
    why += [
        f"{free / 1e9:.0f} GB free / {each / 1e9:.1f} GB each",
        *([f"{_plural(gpus, 'GPU')} / {gpus_each} each"] if gpus else []),
    ]
    return max(1, min(limits)), "; ".join(why)


def _plural(number: float, what: str) -> str:
    return f"{number:g} {what}" + ("" if number == 1 else "s")


def _memory_of(cells: Sequence[Cell], results: Path, on_gpu: bool) -> dict[str, int]:
    """The most memory of this machine that a run of each strategy takes, in bytes, by its label."""
    plans = {cell.strategy: cell.plan for cell in cells}
    most = {label: _estimated(plan.protocol, plan.strategy, activations=not on_gpu) for label, plan in plans.items()}
    if on_gpu:  # what records have measured there is the GPU's memory
        return most
    measured: dict[str, int] = {}
    for made in read_records(results).values():
        label = made.strategy.label
        if label in plans and made.protocol.name == plans[label].protocol.name and made.cost:
            peak = max((phase.peak_memory_bytes for phase in made.cost.phases.values()), default=0)
            measured[label] = max(peak, measured.get(label, 0))
    return {**most, **{label: peak for label, peak in measured.items() if peak}}


def _estimated(protocol: Protocol, strategy: Strategy, activations: bool) -> int:
    costs = estimate(protocol, strategy)
    weights = BASE + STATE * costs.parameters_total
    if not activations or not strategy.trains:
        return weights
    schedule = protocol.train.schedule
    dense = (protocol.model, schedule.patch_dropout)
    kept = dense_activations(*dense) * costs.forward_flops / forward_flops(*dense)
    return weights + int(ACTIVATIONS * kept * schedule.batch_size)
