"""Two one-thread trainings side by side against one that has both cores: steps of `lab-vit`, dense and upcycled.

usage: python tests/bench/side_by_side.py [BATCH]      prints a Markdown table; gain > 1: side by side is faster

Every training is a process of its own on made-up pairs, under the DeepSpeed engine as in `upcycle-bench run`.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from upcycle_bench.data.batches import Batch, BatchSource

STEPS = 16


class MadeUpPairs(BatchSource):
    """Stands in for a PairDataset: random pixels, captions of three to eight tokens."""

    def __init__(self, context: int) -> None:
        self.context, self.generator = context, torch.Generator().manual_seed(0)

    def part(self, seed: int | str, step: int, batch_size: int, first: int, last: int) -> Batch:
        """As many pairs as there are places in [first, last), others at every call."""
        size = last - first
        images = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, generator=self.generator)
        length = torch.randint(3, 9, (size, 1), generator=self.generator)
        place = torch.arange(self.context)
        texts = torch.randint(1, 49406, (size, self.context), generator=self.generator)
        texts = torch.where(place == length - 1, 49407, torch.where(place < length, texts, 0))
        return Batch(images, texts, torch.arange(size))


def child(kind: str, threads: int, batch: int) -> None:
    """Print the median seconds of a step."""
    from upcycle_bench.model.clip import create_clip
    from upcycle_bench.model.ffn import FFN
    from upcycle_bench.model.surgery import find_layers, put_experts
    from upcycle_bench.planning.registry import load_registry
    from upcycle_bench.protocol import load_protocol
    from upcycle_bench.strategy import configure
    from upcycle_bench.training import session
    from upcycle_bench.training.job import Job
    from upcycle_bench.training.loop import train
    from upcycle_bench.util.rng import Stream

    registry = load_registry()
    protocol = load_protocol(registry.get("protocol", "lab").target)
    schedule = protocol.train.schedule.model_copy(update={"steps": STEPS, "batch_size": batch})
    with session.open_session(threads):
        clip = create_clip(protocol.model)
        strategy = configure(registry.get("strategy", "sparse-upcycling").target, {})
        rng = Stream(("bench",))
        if kind == "upcycled":
            model = clip.model
            inits = {
                layer.name: strategy.init_layer(FFN.of(model.get_submodule(layer.mlp_path)), layer, None, rng)
                for layer in find_layers(model, protocol.moe)
            }
            clip = replace(clip, model=put_experts(model, inits, protocol.moe))
        job = Job(schedule=schedule, peak_lr=1e-4, stop_step=STEPS, seed=0, log_every=STEPS)
        times = [time.perf_counter()]
        pairs: Any = MadeUpPairs(clip.model.context_length)
        train(clip, pairs, job, on_step=lambda step, metrics: times.append(time.perf_counter()))
    print(statistics.median(later - earlier for earlier, later in itertools.pairwise(times[2:])))


def seconds(kind: str, threads: int, batch: int, count: int) -> float:
    """Median step of `count` such trainings at once, which share the cores."""
    command = [sys.executable, __file__, "--child", kind, str(threads), str(batch)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(count)
    ]
    return statistics.fmean(float(process.communicate()[0]) for process in running)


def main(batch: int) -> None:
    """All measurements, one after the other."""
    print(
        "| lab-vit step | a run, two threads, s | a run, one thread, s | two runs, one thread each, s | gain of two |"
    )
    print("| --- | --- | --- | --- | --- |")
    for kind in ("dense", "upcycled"):
        two, one, beside = (seconds(kind, threads, batch, count) for threads, count in ((2, 1), (1, 1), (1, 2)))
        print(f"| {kind}, batch {batch} | {two:.3f} | {one:.3f} | {beside:.3f} | {2 * min(one, two) / beside:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
