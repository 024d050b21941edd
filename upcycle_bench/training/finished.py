"""Finished trainings in the cache: a run that differs only in its suites scores stored weights and trains nothing.

    key = finished.key_of(run_id, device)          # the run, the libraries and the hardware
    finished.store(key, facts, metrics)            # cache/trained/KEY.json and KEY.jsonl, by rank 0
    found = finished.look_up(key)                  # (Trained, the model); None: it must be trained

The weights stand in cache/weights under their sha256. A training that failed is never stored. If a stored file was
damaged, the training is not found and runs again; this is not an error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import JsonValue

from upcycle_bench.model import backends, weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.planning.fingerprint import fingerprint
from upcycle_bench.record import Part, PhaseCost, PhaseName, Timestamp
from upcycle_bench.training.job import Progress
from upcycle_bench.util import distributed, environment
from upcycle_bench.util.cache import cache_root, locked
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import file_sha256, write_atomically
from upcycle_bench.util.plain import plain


class Trained(Part):
    """A finished training: its weights, and the parts of a record that a run with other suites takes from it.

    `weights` is the sha256 of the file, `environment` and `time` are where and when it ran.
    """

    weights: str
    parameters: tuple[int, int] | None = None  # total, active, of the trained form; older files: None
    receipt: dict[str, JsonValue] | None
    phases: dict[PhaseName, PhaseCost]
    progress: Progress
    environment: dict[str, JsonValue]
    time: Timestamp


def key_of(run_id: str, device: torch.device) -> str:
    """The name of a training in the cache.

    It depends on the versions of the libraries, the hardware, a forced backend of the experts, and on whether fast
    paths are off (`util.plain`): others round differently, so their weights differ.
    """
    versions = [environment.installed_version(name) for name in environment.PACKAGES if name != "upcycle-bench"]
    forced = [name] if (name := backends.forced()) else []
    forced += ["plain"] if plain() else []
    return fingerprint([run_id, versions, device.type, environment.device_name(device.type), *forced])


def metrics_of(key: str) -> Path:
    """The file with the metrics of that training, as JSON lines."""
    return cache_root() / "trained" / f"{key}.jsonl"


def store(key: str, facts: Trained, metrics: Path) -> None:
    """Store a finished training, in place of an older one. The JSON is written last, so it never stands alone."""
    target = metrics_of(key)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, metrics.read_bytes())
    write_atomically(target.with_suffix(".json"), facts.model_dump_json(indent=1).encode())


def look_up(key: str) -> tuple[Trained, Clip] | None:
    """The stored training, and its model with all experts in this process; None unless all files are whole."""
    metrics = metrics_of(key)
    try:
        facts = Trained.model_validate_json(metrics.with_suffix(".json").read_bytes())
        path = cache_root() / "weights" / f"{facts.weights}.safetensors"
        if not metrics.is_file() or file_sha256(path) != facts.weights:
            return None
        return facts, weights.load(path)
    except (OSError, ValueError, UserError):  # missing; not readable; of another version
        return None


@contextlib.contextmanager
def work_folder(key: str, resumable: bool, fresh: bool = False) -> Iterator[Path]:
    """The folder for checkpoints and metrics during a training; deleted afterwards.

    After an interruption it stays if it holds a checkpoint. A process locks it: a second process with the same training
    (`lab` and `lab-dev` have the same) waits, then finds the training finished. Without checkpoints (not `resumable`),
    each process has a folder of its own. `fresh` deletes what an interrupted training left.
    """
    path = cache_root() / "runs" / key
    if not resumable:
        path = path.with_name(f"{path.name}-{distributed.from_main(os.getpid())}")
    with locked(path, "the same training") if distributed.is_main() else contextlib.nullcontext():
        if fresh and distributed.is_main():
            shutil.rmtree(path, ignore_errors=True)
        distributed.barrier()
        path.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        except BaseException:
            if not (path / "checkpoints" / "latest").is_file() and distributed.is_main():
                shutil.rmtree(path, ignore_errors=True)
            raise
        if distributed.is_main():
            shutil.rmtree(path, ignore_errors=True)
