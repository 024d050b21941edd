"""The dense model: trained on a protocol's own data up to the upcycling point, shipped with the package, or given.

    clip, sha256 = load_dense(protocol, world, source, device, reporter)  # trains it first if the cache lacks it
    path, trained = pretrain_once(protocol, world, reporter)            # what `upcycle-bench pretrain` does
    facts = pretrain(protocol, world, path, device, reporter)           # the training itself; resumable
    export(path, Path("lab-vit.safetensors"))                           # half precision, half the size

Beside each pre-trained checkpoint stand two files of the same name: a .json with recipe, last metrics, cost and
environment, and a .jsonl with the lines of metrics.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle_bench.data.batches import Loading
from upcycle_bench.data.training_pairs import training_pairs
from upcycle_bench.data.world import World
from upcycle_bench.model import backends
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.pretrained import Pretrained
from upcycle_bench.model.state_dict import UNSAVED, require_finite
from upcycle_bench.planning.fingerprint import dense_facts, dense_recipe, recipe_path
from upcycle_bench.planning.identity import dense_command, dense_name
from upcycle_bench.protocol import Protocol
from upcycle_bench.training import session
from upcycle_bench.training.job import Job
from upcycle_bench.training.loop import train
from upcycle_bench.training.same_view import require_same_view
from upcycle_bench.training.stopping import at_steps
from upcycle_bench.training.trackers import Tracked, Trackers
from upcycle_bench.training.work_folder import say_others, work_folder
from upcycle_bench.util import distributed, strict_json
from upcycle_bench.util.cache import locked
from upcycle_bench.util.files import atomic, file_sha256, write_atomically
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter

SIGMOID = (
    "the dense model has a logit bias, as models for the sigmoid loss have; here every strategy trains with CLIP's "
    "softmax loss, in which the bias has no part"
)


def load_dense(
    protocol: Protocol,
    world: World,
    source: Pretrained,
    device: torch.device,
    reporter: Reporter,
    loading: Loading | None = None,
) -> tuple[Clip, str]:
    """The dense model of the weights at `source`, on `device`, and their identity; every rank must call it.

    For a protocol that trains its own dense model, it is trained here if there is no file yet. A logit bias, of a model
    trained with the sigmoid loss, is frozen: it has no part in the softmax loss that all strategies train with.
    """
    path = source.file
    if protocol.dense.source == "pretrain":
        with locked(path, "the dense model") if distributed.is_main() else contextlib.nullcontext():
            if not distributed.from_main(path.is_file()):
                pretrain(protocol, world, path, device, reporter, loading=loading)
    digest = distributed.from_main(source.identity() if distributed.is_main() else "")
    # Rank 0 reads the file and sends the weights: other machines may not have it.
    patch_dropout = protocol.train.schedule.patch_dropout
    clip = source.create(patch_dropout=patch_dropout) if distributed.is_main() else None
    facts = distributed.from_main(clip and (clip.model.logit_bias is not None, dict(clip.interpolated)))
    if clip is None:
        made = create_clip(source.name, preprocess=source.preprocess, patch_dropout=patch_dropout, logit_bias=facts[0])
        clip = replace(made, interpolated=facts[1])
    if facts[0]:
        clip.model.logit_bias.requires_grad_(False)
        if distributed.is_main():
            print(SIGMOID, file=sys.stderr)
    distributed.send_from_main(clip.model.to(device))
    return clip, digest


def pretrain_once(
    protocol: Protocol,
    world: World,
    reporter: Reporter,
    track: Sequence[str] = (),
    loading: Loading | None = None,
) -> tuple[Path, bool]:
    """Train the protocol's dense model unless the cache has it; returns its path, and whether it was trained now.

    `track`: names of trackers, whose files go to `tracking` beside the model. `loading`: how batches are read.

    Every rank must call it. If two processes want the same model, the second one waits and then finds the first one's.
    """
    with session.open_session(protocol.threads) as device:
        require_same_view(world)
        path = recipe_path(dense_recipe(protocol, world))
        with locked(path, "the dense model") if distributed.is_main() else contextlib.nullcontext():
            # The metrics are written last, so that with them all files are there.
            there = distributed.from_main(path.is_file() and path.with_suffix(".jsonl").is_file())
            if not there:
                pretrain(protocol, world, path, device, reporter, track, loading)
    return path, not there


def pretrain(
    protocol: Protocol,
    world: World,
    path: Path,
    device: torch.device,
    reporter: Reporter,
    track: Sequence[str] = (),
    loading: Loading | None = None,
) -> dict[str, Any]:
    """Train the dense model to the upcycling point and write it to `path`, atomically.

    Must run inside `session.open_session`, on every rank. Returns the content of the .json on rank 0, {} on others.
    An interrupted training continues at the next call, also on other ranks and with other versions.
    """
    facts, command = dense_facts(protocol, world), dense_command(protocol, world)
    say_others(facts, command)
    with work_folder(facts, command) as work, at_steps():  # once it is trained, it is written, whatever signal comes
        return _pretrain(protocol, world, path, device, reporter, track, loading, work)


def _pretrain(
    protocol: Protocol,
    world: World,
    path: Path,
    device: torch.device,
    reporter: Reporter,
    track: Sequence[str],
    loading: Loading | None,
    work: Path,
) -> dict[str, Any]:
    schedule = protocol.dense.schedule
    clip = create_clip(protocol.model, patch_dropout=schedule.patch_dropout, seed=protocol.dense.seed)
    clip.model.to(device)
    stop = round(protocol.dense.stop_fraction * schedule.steps)
    tracked = Tracked(
        name=f"dense {protocol.dense.seed}",
        id=work.name,
        group=protocol.name,
        folder=path.parent / "tracking" / work.name,
        config={"protocol": protocol.name, "model": protocol.model, "seed": protocol.dense.seed, "id": work.name},
    )
    trackers = Trackers(track, tracked) if distributed.is_main() else Trackers()
    job = Job(
        purpose="dense",
        schedule=schedule,
        peak_lr=protocol.dense.lr,
        stop_step=stop,
        seed=protocol.dense.seed,
        log_every=protocol.train.log_every,
        metrics=work / "metrics.jsonl",
        checkpoints=work / "checkpoints",
        checkpoint_every=protocol.train.checkpoint_every,
        trackers=trackers,
    )
    meter = Meter(device)
    with trackers, meter.phase("train") as phase, reporter.bar("dense model", stop) as bar:
        data = training_pairs(world, clip, schedule.augmentation, protocol.data, loading)
        progress = train(clip, data, job, on_step=bar)
    phase.seconds, phase.flops = progress.seconds, progress.total_flops()
    facts: dict[str, Any] = {}
    if distributed.is_main():
        _write(path, {key: value.cpu().contiguous() for key, value in clip.model.state_dict().items()})
        facts = {
            "protocol": protocol.name,
            "recipe": dense_recipe(protocol, world),
            "facts": dense_name(protocol, world),
            "dense": protocol.dense.model_dump(mode="json"),
            "model": protocol.model,
            "threads": protocol.threads,
            "data": world.sha256,
            "sha256": file_sha256(path),
            "last metrics": progress.last,
            "cost": asdict(phase),
            "samples": progress.step * schedule.batch_size,
            "sessions": [asdict(session) for session in progress.sessions],
            "environment": backends.machine(device),
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        }
        write_atomically(path.with_suffix(".json"), (strict_json.dumps(facts, indent=2) + "\n").encode())
        write_atomically(path.with_suffix(".jsonl"), (work / "metrics.jsonl").read_bytes())
        shutil.rmtree(work / "checkpoints", ignore_errors=True)  # it is done, even if a signal ends the command now
    distributed.barrier()
    return facts


def export(path: Path, target: Path) -> str:
    """Write the checkpoint at `path` in half precision to `target`, with its .json and .jsonl; returns its sha256."""
    from safetensors.torch import load_file

    _write(target, {key: value.half() for key, value in load_file(path).items()})
    facts = strict_json.loads(path.with_suffix(".json").read_text())
    digest = file_sha256(target)
    text = strict_json.dumps({"half precision sha256": digest, **facts}, indent=2) + "\n"
    write_atomically(target.with_suffix(".json"), text.encode())
    write_atomically(target.with_suffix(".jsonl"), path.with_suffix(".jsonl").read_bytes())
    return digest


def _write(path: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    require_finite(state, "the dense model", UNSAVED)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        save_file(state, part)
