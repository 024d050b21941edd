"""Rows 10 to 14: all around the training step: data, start, evaluation (the lab must be in the cache), inference."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.bench.floor import floor
from tests.bench.rows import Row, Settings, SkippedError, measures
from tests.bench.timing import Sample, compare, interleave, ratio_row, seconds_row
from tests.bench.training import lab_clip, lab_job, lab_protocol, made_up_batches, our_step, upcycled
from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds.lab import VERSION
from upcycle_bench.evaluation.score import score
from upcycle_bench.model import padding
from upcycle_bench.planning.plan import Plan, make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import Protocol
from upcycle_bench.reporting import latency
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.threads import one_thread

ROOT = Path(__file__).parents[2]
SCORED = tuple(f"{name}{kind}" for name in ("validation", "temperature") for kind in ("", "-retrieval"))
KEPT = ("worlds", "decoded", "downloads", "dense")  # parts of the cache that hold no run


def lab_plan(protocol: Protocol | None = None) -> Plan:
    """A run of the lab, resolved. SkippedError unless its world has been built."""
    if not (cache_root() / "worlds" / f"lab-{VERSION}").is_dir():
        raise SkippedError("the lab is not in the cache: upcycle-bench data build lab")
    return make_plan(load_registry(), "dense", protocol or lab_protocol())


@measures(10)
def data_loader(settings: Settings) -> Iterator[Row]:
    """Samples per second of the lab's data loader alone / that a dense training step takes, the fastest there is."""
    plan, clip, job = lab_plan(), lab_clip(settings.device), lab_job()
    assert plan.world is not None
    size = job.schedule.batch_size
    pairs = PairDataset(plan.world.train_shards, clip)
    loaded = pairs.batches(0, 0, 1_000_000, size)
    step = our_step(clip, job, made_up_batches(clip, size))
    many = 20  # a batch takes a few milliseconds
    (training, loading) = interleave(
        [step, lambda: [None for _ in itertools.islice(loaded, many)]], settings.rounds, settings.device
    )
    yield ratio_row(
        "data loader / need of dense training, samples per second, lab",
        ">= 3",
        training,
        [Sample(sample.wall / many, sample.cpu / many) for sample in loading],
    )


def child_clock(command: Sequence[str], environment: dict[str, str] | None = None) -> Sample:
    """Seconds from start to end of a process, which must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


@measures(11)
def commands(settings: Settings) -> Iterator[Row]:
    """What a user waits for a page of help, and for the list of all plugins."""
    for arguments, goal in (["--help"], "<= 0.3"), (["list"], "<= 2"):
        command = [sys.executable, "-m", "upcycle_bench", *arguments]
        child_clock(command)
        samples = [child_clock(command) for _ in range(settings.rounds)]
        yield seconds_row(f"upcycle-bench {arguments[0]}", goal, samples)


@contextlib.contextmanager
def borrowed_cache() -> Iterator[dict[str, str]]:
    """An environment whose cache has this one's data and no runs; all that is written there goes."""
    with tempfile.TemporaryDirectory() as folder:
        for name in KEPT:
            if (cache_root() / name).exists():
                os.symlink(cache_root() / name, Path(folder) / name)
        yield os.environ | {"UPCYCLE_BENCH_CACHE": folder}


@measures(12)
def first_step(settings: Settings) -> Iterator[Row]:
    """From `run` to the first training step, data and dense model in the cache / importing torch and DeepSpeed.

    Seconds of the one less those of the other, of processes in turns; `sparse-upcycling`, which needs no calibration
    (row 7 is about that), in the lab, with the lab's threads. At most three rounds.
    """
    lab_plan()
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    with borrowed_cache() as environment:
        results = Path(environment["UPCYCLE_BENCH_CACHE"]) / "results"
        child = [sys.executable, "-m", "tests.bench.first_step"]
        started = [*child, "run", "--strategy", "sparse-upcycling", "--results", str(results)]
        for number in range(settings.few_rounds + 1):
            pair = child_clock(started, environment), child_clock([*child, "imports"], environment)
            if number:  # the first round warms up the page cache
                for sample, taken in zip(pair, samples, strict=True):
                    taken.append(sample)
    yield seconds_row("from `run` to the first step, beyond imports, lab", "<= 5", *samples)


@measures(13)
def evaluation(settings: Settings) -> Iterator[Row]:
    """Evaluating the lab's dense model, as a run does it / reading and encoding the images and texts once.

    Both with one thread and without text padding; both read and encode in turns. Of the 18 sets those of validation and
    temperature, which hold over half of the images and the largest galleries: scoring grows with their square, so all
    18 have a smaller ratio. At most two rounds.
    """
    suites = {"zero-shot": {"sets": SCORED, "headlines": {"in-distribution": SCORED}}}
    plan, clip = lab_plan(lab_protocol().model_copy(update={"suites": suites})), lab_clip(settings.device)
    assert plan.world is not None
    root, final = plan.world.eval_root, replace(clip, model=clip.model.eval())

    def evaluate() -> Any:
        return score(plan.suites, root, final, Meter(settings.device), Reporter(), "")

    with one_thread():
        steps = [evaluate, lambda: encode_once(plan, clip, settings.device)]
        ours, reference = interleave(steps, min(2, settings.rounds), settings.device, warm=False)
    name = "whole evaluation / encoding its images and texts once, lab's validation"
    yield ratio_row(name, "<= 1.15", ours, reference)


@torch.no_grad()
def encode_once(plan: Plan, clip: Any, device: torch.device, size: int = 256) -> int:
    """Read all sets of all suites and encode each image and each different text; returns how many."""
    from clip_benchmark.datasets.builder import build_wds_dataset

    assert plan.world is not None
    texts: dict[str, None] = {}
    images = 0
    for suite in plan.suites.values():
        for name in suite.datasets():
            folder = plan.world.eval_root / name
            evalset = evalsets.read(folder, clip.transform, size)
            texts |= dict.fromkeys(t.format(c=c) for c in evalset.classnames for t in evalset.templates)
            batches = build_wds_dataset(name, clip.transform, split="test", data_dir=str(folder)).batched(size)
            for images_B3HW, beside in batches:
                F.normalize(clip.model.encode_image(images_B3HW.to(device)), dim=-1).cpu()
                images += len(images_B3HW)
                if evalset.kind == "retrieval":
                    texts |= dict.fromkeys(text for captions in beside for text in captions)
    every = list(texts)
    for start in range(0, len(every), size):
        text_BL = clip.tokenize(every[start : start + size]).to(device)
        F.normalize(padding.encode_text(clip.model, text_BL), dim=-1).cpu()
    return images + len(every)


@measures(14)
def inference(settings: Settings) -> Iterator[Row]:
    """Encoding with the lab's upcycled model / with the dense one, fp32, each tower: one input alone, and a batch.

    One input is latency, a batch throughput. `upcycle-bench latency` measures the same of any models.
    """
    dense = lab_clip(settings.device)
    sparse = upcycled(dense, lab_protocol().moe)
    models = [clip.model.eval() for clip in (sparse, dense)]
    for what, encoder in (("images", latency.image_encoder), ("texts", latency.text_encoder)):
        for size in (1, latency.BATCH):
            ours, theirs = (encoder(dense, model, size) for model in models)
            least = floor(ours, "fp32", settings)
            yield compare(f"inference: MoE / dense, lab, {what}, batch {size}", "", ours, theirs, settings, floor=least)
