"""A training's lines of metrics, and at the end its scores, for TensorBoard, Weights & Biases and CSV.

    require(["tensorboard", "csv"])                                   # UserError, before anything runs
    with Trackers(["tensorboard", "csv"], run) as trackers:           # run: a Tracked; on rank 0
        trackers.begin(0)                                             # or the step of a checkpoint
        trackers.log({"step": 1, "loss": 2.3, "layers": {...}})
        trackers.scores({"in-distribution": 0.08}, step=100)

A tracker that fails is named in one warning and left out; the run goes on.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError, one_line, unknown
from upcycle_bench.util.files import atomic


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What is tracked: `name` for people, `id` for machines, `group` is the protocol; files go to `folder`."""

    name: str
    id: str
    group: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """One client. It is made when the training begins after `step` steps, or goes on there."""

    def __init__(self, run: Tracked, step: int) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Csv:
    """`metrics.csv`: a row for each line of metrics, a column for each value. Rows after the checkpoint are cut."""

    def __init__(self, run: Tracked, step: int) -> None:
        self.path = run.folder / "metrics.csv"
        self.names = ["step"]
        self._write([], upto=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **values}
        if new := [name for name in row if name not in self.names]:  # another stage of the training has other terms
            self._write(new, upto=step)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.names).writerow(row)

    def _write(self, new: Sequence[str], upto: int) -> None:
        """Write the file again, row by row, with these new columns, and no row of a later step; none of step 0."""
        with contextlib.ExitStack() as files:
            before: Iterable[dict[str, Any]] = []
            if upto and self.path.is_file():
                reader = csv.DictReader(files.enter_context(self.path.open(newline="")))
                self.names, before = list(reader.fieldnames or self.names), reader
            self.names += new
            part = files.enter_context(atomic(self.path))
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.names)
                writer.writeheader()
                writer.writerows(row for row in before if int(row["step"]) <= upto)

    def close(self) -> None:
        pass


class TensorBoard:
    """A file of events; `tensorboard --logdir results` finds it. Those after the checkpoint are hidden."""

    def __init__(self, run: Tracked, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(run.folder), purge_step=step + 1)
        if step == 0:
            self.writer.add_text("run", "\n".join(f"- {key}: {value}" for key, value in run.config.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases. Its own files stand in the cache or where WANDB_DIR says: results hold records only.

    A resumed training goes on in the same run; a new one with the same id (`--fresh`) is another run.
    """

    def __init__(self, run: Tracked, step: int) -> None:
        import wandb

        file = run.folder / "wandb-id"
        if not (step and file.is_file()):
            file.write_text(f"{run.id[:12]}-{time.strftime('%Y%m%dT%H%M%S')}")
        folder = Path(os.environ.get("WANDB_DIR") or cache_root())
        folder.mkdir(parents=True, exist_ok=True)
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "upcycle-bench"),
            name=run.name,
            group=run.group,
            id=file.read_text(),
            resume="allow",
            config=dict(run.config),
            dir=str(folder),
            settings=wandb.Settings(console="off", quiet=True),
        )
        self.run.define_metric("*", step_metric="step")  # steps after a checkpoint come again

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "csv": Csv}


def require(names: Sequence[str]) -> None:
    """Raise UserError for a name of no tracker, and for one whose package is not installed."""
    for name in names:
        if name not in KINDS:
            raise unknown("tracker", name, KINDS)
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name}: its package is not installed: pip install 'upcycle-bench[{name}]'.")


class Trackers:
    """All trackers of a training; none by default. They start when it begins."""

    def __init__(self, names: Sequence[str] = (), run: Tracked | None = None) -> None:
        self.names, self.run = names, run
        self.open: dict[str, Tracker] | None = None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.open or {}):
            self._safely(name, lambda tracker: tracker.close())

    def begin(self, step: int) -> None:
        """Start the trackers of a training that has done `step` steps."""
        if self.run is None or self.open is not None:
            return
        self.open = {}
        for name in self.names:
            try:
                self.run.folder.mkdir(parents=True, exist_ok=True)
                self.open[name] = KINDS[name](self.run, step)
            except Exception as error:  # a client may raise anything
                _warn(name, error)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics: every number in it, named by its place (`vision.1/load/0`)."""
        values = dict(_numbers({key: value for key, value in line.items() if key not in ("step", "layers")}))
        values |= _numbers(line.get("layers", {}))
        for name in list(self.open or {}):
            self._safely(name, lambda tracker: tracker.log(line["step"], values))

    def scores(self, headlines: Mapping[str, float], step: int) -> None:
        """Log the headline scores of the model after `step` steps, also of a training of an earlier session."""
        self.begin(step)
        self.log({"step": step, "score": dict(headlines)})

    def _safely(self, name: str, call: Any) -> None:
        assert self.open is not None
        try:
            call(self.open[name])
        except Exception as error:  # a client may raise anything
            del self.open[name]
            _warn(name, error)


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, list):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def _warn(name: str, error: Exception) -> None:
    print(f"warning: the tracker {name} failed and is left out from here on: {one_line(error)}", file=sys.stderr)
