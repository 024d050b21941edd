"""Checkpoints of a training, and its file of metrics: what an interrupted training needs to continue.

    with Checkpoints(job) as kept, MetricsFile(job.metrics, kept.step) as log:
        progress = kept.restore(engine, extra)              # the newest whole checkpoint's, or a new one
        log.write({"step": 1, "loss": 2.3})
        kept.save(engine, extra, progress)                  # copies the state; a thread writes it
        kept.save(engine, extra, progress, "SIGTERM")       # the last one: waits until it is there

The training waits only for the copy in CPU memory, and for the checkpoint before if that is still being written. The
thread talks to those of other ranks in a process group of its own.
"""

from __future__ import annotations

import copy
import errno
import itertools
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training.checkpoint_files import (
    LossEntry,
    Manifest,
    metadata,
    newest,
    publish,
    read,
    steps,
    temporary,
)
from upcycle_bench.training.job import Job, Progress
from upcycle_bench.training.named_state import State, collect, leaves, restore
from upcycle_bench.util import distributed, strict_json
from upcycle_bench.util.errors import UserError, one_line
from upcycle_bench.util.files import atomic, disk_is_full, file_sha256, full_disk_said

PATIENCE = 30.0  # seconds that a training which failed waits for the thread


class MetricsFile:
    """A file of JSON lines that grows; without a path, nothing is written.

    Of a file that exists, the lines up to `step`, the last checkpoint's, stay: a resumed training writes the later
    ones again.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path, self.step, self._waiting, self._end = path, step, b"", 0

    def __enter__(self) -> MetricsFile:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.read_text().splitlines() if self.path.is_file() and self.step else []
            with atomic(self.path) as part:
                part.write_text("".join(line + "\n" for line in itertools.takewhile(self._is_earlier, before)))
            self.file = self.path.open("ab", buffering=0)
            self._end = self.path.stat().st_size
        return self

    def _is_earlier(self, line: str) -> bool:
        """Whether a line is whole and of no later step; a process that was killed may leave half of its last one."""
        try:
            return bool(strict_json.loads(line)["step"] <= self.step)
        except (ValueError, KeyError, TypeError):
            return False

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line. Where the disk is full, as while a checkpoint is written, it waits for the next one."""
        if self.path is not None:
            self._waiting += strict_json.dumps(metrics).encode() + b"\n"
            try:
                self._write()
            except OSError as error:
                if not disk_is_full(error):
                    raise

    def _write(self) -> None:
        try:
            if self.file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.file.truncate(self._end)  # no half line
            raise
        self._end, self._waiting = self._end + len(self._waiting), b""

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            with self.file, full_disk_said(self.path):
                if self._waiting:
                    self._write()


class NotKept(UserError):
    """A training that was asked to stop could not write its checkpoint."""

    status = 1


class Checkpoints:
    """The checkpoints of one training. Every rank makes one, and calls the same methods at the same steps.

    `step`: after which the newest whole checkpoint was written; 0 without one. Without a folder (`job.checkpoints`)
    nothing is written. Raises UserError where there are checkpoints and none can be read.
    """

    def __init__(self, job: Job) -> None:
        self.folder, self._failures = job.checkpoints, 0
        self._writing: _Writing | None = None
        self._group = distributed.cpu_group("checkpoints") if self.folder else None
        self._found = None
        if self.folder is not None:
            warnings.filterwarnings("ignore", message="torch.distributed is .* single process")  # as is meant
            if distributed.is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                for part in self.folder.glob(".step*.tmp"):  # of a process that was killed
                    shutil.rmtree(part, ignore_errors=True)
            distributed.barrier()
            self._found = newest(self.folder)
        self.step = self._found[1].step if self._found else 0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._writing is None:
            return
        if kind is None:  # the training is done: the last checkpoint was only for what comes after it
            self.finish(fatal=False)
        else:  # other ranks may be gone, and its thread may wait for them
            self._writing.join(PATIENCE)

    def restore(self, engine: Any, extra: ExtraLoss | None) -> Progress:
        """Load the newest checkpoint into the engine and the extra loss; returns its progress, or a new one.

        PluginError for an extra loss whose state no checkpoint can keep.
        """
        if self.folder is not None and extra is not None:
            list(leaves(extra.state_dict()))
        if self._found is None:
            return Progress()
        path, manifest = self._found
        known = metadata(path)
        names = known.state_dict_metadata.keys()
        restore(engine, extra, lambda wanted: read(path, wanted, known), names, manifest.steps, manifest.entries())
        progress = copy.deepcopy(manifest.progress)
        if not distributed.is_main():
            progress.counted_flops = 0  # rank 0 has those of all
        return progress

    def save(self, engine: Any, extra: ExtraLoss | None, progress: Progress, stop_by: str | None = None) -> None:
        """Begin to write a checkpoint of this step; returns as soon as its state has been copied.

        A checkpoint that could not be written is told in one line, and the one before stays. UserError for the second
        in a row. `stop_by`: the signal that ends the training with this one, which is then there, or NotKept is raised.
        """
        assert self.folder is not None, "a checkpoint needs a folder"
        self.finish(stop_by=stop_by)
        kept = copy.deepcopy(progress)
        kept.counted_flops = distributed.sum_over_ranks(progress.counted_flops)
        self._writing = _Writing(self.folder, collect(engine, extra), kept, self._group)
        self._writing.start()
        if stop_by and (failure := self._outcome()):
            before = next(iter(steps(self.folder)), 0)
            raise NotKept(
                f"stopped by {stop_by}, but {failure} The same command goes on from "
                f"{f'the checkpoint before, of step {before}' if before else 'step 0, since there is none before it'}."
            )

    def finish(self, fatal: bool = True, stop_by: str | None = None) -> None:
        """Wait until the checkpoint that is being written is there or has failed; if `fatal`, as `save` says."""
        if (failure := self._outcome()) is None:
            return
        if self._failures > 1 and fatal:
            raise UserError(f"{failure} It is the second in a row; the same command goes on from the last good one.")
        if distributed.is_main():
            then = "." if stop_by else ", and the training goes on."
            print(f"warning: {failure} The one before stays{then}", file=sys.stderr)

    def _outcome(self) -> str | None:
        """Wait for the checkpoint that is being written; returns what to say where it has failed."""
        if self._writing is None:
            return None
        self._writing.join()
        failure, step, self._writing = self._writing.failure, self._writing.progress.step, None
        self._failures = self._failures + 1 if failure else 0
        return f"the checkpoint of step {step} was not written: {failure}" if failure else None


class _Writing(threading.Thread):
    """Writes one checkpoint. `failure`: why it could not, the same on every rank; None if it is there."""

    def __init__(self, folder: Path, state: State, progress: Progress, group: Any) -> None:
        super().__init__(name="checkpoint", daemon=True)  # a process that ends need not wait for it
        self.folder, self.state, self.progress, self.group = folder, state, progress, group
        self.failure: str | None = "its thread ended."

    def run(self) -> None:
        part = temporary(self.folder, self.progress.step)
        files: dict[str, str] = {}
        failure = None
        try:
            with full_disk_said(self.folder):
                files = self._write(part)
        except Exception as error:
            failure = one_line(error)
        share = (files, self.state.steps, self.state.loss, failure)
        try:
            shares = distributed.from_all(share, self.group)
            failure = next(filter(None, (each[3] for each in shares)), None)
            if distributed.is_main():
                failure = self._publish(shares) if failure is None else failure
                if failure:
                    shutil.rmtree(part, ignore_errors=True)
            box = [failure]
            if self.group is not None:
                dist.broadcast_object_list(box, group=self.group)
            self.failure = box[0]
        except Exception as error:  # another rank is gone; the training will find out
            self.failure = one_line(error)

    def _write(self, part: Path) -> dict[str, str]:
        """Write this rank's share; returns the sha256 of its files, by name."""
        from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

        writer, alone = FileSystemWriter(part), self.group is None
        try:
            save(self.state.tensors, storage_writer=writer, process_group=self.group, no_dist=alone)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
        self.state.tensors.clear()  # their memory, before the files are read again
        mine = [*part.glob(f"__{distributed.rank()}_*"), *([part / ".metadata"] if distributed.is_main() else [])]
        return {path.name: file_sha256(path) for path in mine}

    def _publish(self, shares: list[Any]) -> str | None:
        """On rank 0: write the manifest and rename the folder; returns why that failed, or None."""
        files, counts, loss = ({k: v for share in shares for k, v in share[part].items()} for part in range(3))
        try:
            manifest = Manifest(
                step=self.progress.step,
                files=files,
                steps=counts,
                loss={name: LossEntry(**asdict(entry)) for name, entry in loss.items()},
                progress=self.progress,
            )
            with full_disk_said(self.folder):
                publish(self.folder, manifest)
        except Exception as error:
            return one_line(error)
        return None
