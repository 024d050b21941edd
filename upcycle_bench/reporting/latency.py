"""How fast models serve: milliseconds for one input alone, and inputs per second in batches, for either tower.

    fast, slow = measure([load(a), load(b)], torch.device("cpu"))
    fast.image_ms, fast.texts_per_second
    facts = measure_files([Path("a.safetensors"), Path("b.safetensors")], repeats=20, threads=2)

All models take turns (A B A B ...) on the same random pixels and the same short prompts; each number is a median over
the turns. In each turn PyTorch's `Timer` calls a model twice to warm up, then once to time it. As in evaluation:
float32 (or the file's own precision), no gradient, text without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

from upcycle_bench.model import padding, weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.model.towers import image_size, image_weight
from upcycle_bench.util.distributed import choose_device

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Latency of one image and of one text in milliseconds, throughput in batches of `BATCH`."""

    image_ms: float
    text_ms: float
    images_per_second: float
    texts_per_second: float


def measure_files(files: Sequence[Path], repeats: int, threads: int | None = None) -> dict[str, Any]:
    """Sizes and speeds of the models in files of ours, on this machine's device with `threads` CPU threads (None: all).

    Raises UserError for a file that is not one of ours. The number of threads is restored afterwards.
    """
    device = choose_device()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        clips = [weights.load(path) for path in files]
        speeds = measure(clips, device, repeats)
    finally:
        torch.set_num_threads(before)
    models = []
    for path, clip, speed in zip(files, clips, speeds, strict=True):
        total, active = parameter_counts(clip.model)
        models.append({"file": str(path), "parameters_total": total, "parameters_active": active, **asdict(speed)})
    return {"device": device.type, "threads": threads or before, "models": models}


def measure(clips: Sequence[Clip], device: torch.device, repeats: int = 20) -> list[Speed]:
    """A `Speed` for each model. Single inputs are timed `repeats` times, batches a quarter as often."""
    models = [(clip, clip.model.to(device).eval()) for clip in clips]
    seconds: dict[tuple[str, int], list[float]] = {}
    for size, rounds in ((1, repeats), (BATCH, max(1, repeats // 4))):
        for tower, encoder in (("image", image_encoder), ("text", text_encoder)):
            seconds[tower, size] = in_turns([encoder(*model, size) for model in models], rounds)
    return [
        Speed(
            image_ms=1e3 * seconds["image", 1][number],
            text_ms=1e3 * seconds["text", 1][number],
            images_per_second=BATCH / seconds["image", BATCH][number],
            texts_per_second=BATCH / seconds["text", BATCH][number],
        )
        for number in range(len(models))
    ]


def image_encoder(clip: Clip, model: Any, size: int) -> Callable[[], Any]:
    """A call that encodes `size` random images, on the model's device."""
    weight = image_weight(model)
    shape = (size, 3, *image_size(model))
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return partial(_without_gradient, model.encode_image, clip.normalise(pixels).to(weight.device, weight.dtype))


def text_encoder(clip: Clip, model: Any, size: int) -> Callable[[], Any]:
    """A call that encodes `size` different short prompts, on the model's device."""
    texts = clip.tokenize([f"a picture of thing number {number}" for number in range(size)])
    encode = padding.text_encoder(model)
    return partial(_without_gradient, encode, texts.to(image_weight(model).device))


def in_turns(
    calls: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float] = benchmark.timer
) -> list[float]:
    """Median seconds of each call; the default clock waits until the accelerator is idle."""
    threads = torch.get_num_threads()
    timers = [benchmark.Timer("call()", globals={"call": call}, timer=clock, num_threads=threads) for call in calls]
    turns = [[timer.timeit(1) for timer in timers] for _ in range(rounds)]
    return [benchmark.Measurement.merge(of_one)[0].median for of_one in zip(*turns, strict=True)]


@torch.no_grad()
def _without_gradient(encode: Callable[[Any], Any], inputs: Any) -> Any:
    return encode(inputs)
