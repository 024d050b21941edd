"""Rows 7 to 9: making experts, against the one pass over the data or the one copy that cannot be avoided.

`python -m tests.bench.initialisation ours|naive TOKENS` prints the bytes that making one layer's experts needs at
most beyond what the process had before, on a stream of so many tokens: row 8's children.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.layers import random_ffn
from tests.bench.naive import StoredActivations, naive_experts
from tests.bench.rows import Row, Settings, measures
from tests.bench.timing import compare
from tests.bench.training import lab_clip, lab_protocol, made_up_batches
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.ffn import FFN, Layer
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import configure
from upcycle_bench.training.allocator import return_freed_memory
from upcycle_bench.upcycling.initialise import make_experts
from upcycle_bench.util.rng import Stream
from upcycle_bench.util.threads import one_thread

WIDTH, EXPERTS = 768, 8  # of the single layer of row 8: ViT-B's
MEMORY_WIDTH = 256  # where its memory is measured, which is not a matter of width
CLUSTER_TOKENS, CHUNK = 8192, 4096
RNG = Stream(("bench", "clusters"))


def token_stream(count: int, width: int, device: torch.device, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Normal tokens with a falling spectrum, made as they are asked for: clusters of about equal size, of full rank."""
    generator = torch.Generator().manual_seed(0)
    scale_D = torch.linspace(1, 0.1, width)
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        yield (torch.randn(size, width, generator=generator) * scale_D).to(device)


def our_experts(ffn: FFN, stream: Iterable[Tensor], cluster_tokens: int = CLUSTER_TOKENS) -> Any:
    """One layer's experts by `cluster-aware`, as `calibrate` and `make_experts` call it."""
    target = load_registry().get("strategy", "cluster-aware").target
    strategy = configure(target, {"cluster_tokens": cluster_tokens})
    layer = Layer("vision", 1, 2, EXPERTS, 2)
    calibrator = strategy.calibrator(ffn, layer, RNG)
    with one_thread():
        for x_TD in stream:
            calibrator.update(x_TD)
        return strategy.init_layer(ffn, layer, calibrator, RNG)


def stored_experts(ffn: FFN, stream: Iterable[Tensor], cluster_tokens: int = CLUSTER_TOKENS) -> Any:
    """The same in the naive way, with PyTorch's threads."""
    stored = StoredActivations()
    for x_TD in stream:
        stored.update(x_TD)
    return naive_experts(ffn, stored, EXPERTS, RNG, cluster_tokens=cluster_tokens)


@contextmanager
def on_cores(number: int) -> Iterator[None]:
    """So many threads of PyTorch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@measures(7)
def cluster_aware_total(settings: Settings) -> Iterator[Row]:
    """All of the lab's cluster-aware initialisation and surgery / one forward pass over its 16,384 calibration pairs.

    Made-up pairs: that the same work is done for each is all that matters here. At most three rounds.
    """
    lab, clip = lab_protocol(), lab_clip(settings.device)
    options = lab.strategies["cluster-aware"]
    strategy = configure(load_registry().get("strategy", "cluster-aware").target, options)
    model = clip.model.eval()
    batches = made_up_batches(clip, 256, strategy.calibration_pairs // 256)

    def inputs(pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield clip.normalise(batch.images), batch.texts

    def initialise() -> Any:
        return put_experts(model, make_experts(strategy, model, lab.moe, 0, inputs), lab.moe)

    @torch.no_grad()
    def forward() -> None:
        for images, texts in inputs(0):
            model.encode_image(images)
            model.encode_text(texts)

    yield compare(
        "cluster-aware initialisation / forward pass over its data, lab",
        "<= 1.20",
        initialise,
        forward,
        settings,
        rounds=settings.few_rounds,
    )


@measures(8)
def naive_ratio(settings: Settings) -> Iterator[Row]:
    """Naive / ours for one layer of ViT-B's width with 8 experts, clusters fitted on 8,192 of 32,768 tokens.

    On one core, then on two: the naive side by PyTorch's threads, ours by one thread. The tokens are there before. Then
    memory beyond that of the process before, each in a process of its own, on 65,536 / on 16,384 tokens of width 256,
    made as they are asked for. At most three rounds, of the naive memory one.
    """
    ffn = random_ffn(WIDTH, torch.Generator().manual_seed(0))
    ffn = replace(ffn, **{name: getattr(ffn, name).to(settings.device) for name in ("w1_HD", "b1_H", "w2_DH", "b2_D")})
    stream = list(token_stream(32768, WIDTH, settings.device))
    for number, where in enumerate(("one core", "two cores")[: settings.threads], start=1):
        with on_cores(number):
            yield compare(
                f"naive cluster-aware / ours, one layer, D={WIDTH}, {where}: time",
                ">= 3",
                lambda: stored_experts(ffn, stream),
                lambda: our_experts(ffn, stream),
                settings,
                rounds=settings.few_rounds,
            )
    for kind, goal, rounds in (("ours", "<= 1.1", settings.few_rounds), ("naive", "", 1)):
        ratios = sorted(peak_bytes(kind, 65536, settings) / peak_bytes(kind, 16384, settings) for _ in range(rounds))
        yield Row(
            name=f"peak memory at 4 times the data / at once the data, {kind}",
            goal=goal,
            value=ratios[len(ratios) // 2],
            min=ratios[0],
            max=ratios[-1],
        )


def peak_bytes(kind: str, tokens: int, settings: Settings) -> int:
    """What a process of its own says, in which glibc gives freed blocks back at once: the peak is of what is alive."""
    command = [sys.executable, "-m", "tests.bench.initialisation", kind, str(tokens), str(settings.threads)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


@measures(9)
def surgery(settings: Settings) -> Iterator[Row]:
    """`sparse-upcycling` of a ViT-B/32, experts and surgery / copying the tensors of its result once.

    Both by one thread, as experts are made, so that they do not depend on the number of threads; in memory that the
    process has to fetch from the system, as where a model is upcycled once, and in memory that it has at hand.
    """
    moe = lab_protocol().moe
    dense = create_clip("ViT-B-32").model.to(settings.device)
    strategy = configure(load_registry().get("strategy", "sparse-upcycling").target, {})

    def operate() -> Any:
        return put_experts(dense, make_experts(strategy, dense, moe, 0, lambda pairs: ()), moe)

    tensors = list(operate().state_dict().values())

    def fetched() -> None:
        gc.collect()
        return_freed_memory()

    for where, before_each in (("memory to be fetched", fetched), ("memory at hand", gc.collect)):
        with one_thread():
            yield compare(
                f"sparse-upcycling of ViT-B/32 / copying its tensors once, {where}",
                "<= 1.5",
                operate,
                lambda: [tensor.clone() for tensor in tensors],
                settings,
                warm=False,
                settle=1,
                before_each=before_each,
            )


def child(kind: str, tokens: int, threads: int) -> int:
    """Peak memory in bytes beyond that before the work."""
    from upcycle_bench.util.meter import forget_peak_memory, peak_memory

    torch.set_num_threads(threads)
    work = {"ours": our_experts, "naive": stored_experts}[kind]
    cpu = torch.device("cpu")
    small, ffn = (random_ffn(width, torch.Generator().manual_seed(0)) for width in (32, MEMORY_WIDTH))
    work(small, token_stream(CLUSTER_TOKENS, 32, cpu))  # libraries load and allocate their buffers
    forget_peak_memory()
    before = peak_memory(cpu)
    work(ffn, token_stream(tokens, MEMORY_WIDTH, cpu))
    return peak_memory(cpu) - before


if __name__ == "__main__":
    print(child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
