"""Trainings of a preparation in the work folder: a finished one keeps its weights, one that was begun its batches.

    found = finished(place, model)              # its cost, and the model has its weights; None: it must be trained
    rows_SB = rows(place, rows_SB)              # those that it began with
    finish(place, model, Branch(flops, steps, samples, seconds))

    place/rows.safetensors, checkpoints/        until it is finished
    place/model.safetensors, done.json          afterwards, done.json last

Every rank must call each function.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from upcycle_bench.util import distributed, strict_json
from upcycle_bench.util.files import atomic, file_sha256, write_atomically


@dataclass(frozen=True)
class Branch:
    """What a finished training cost, over all ranks and sessions."""

    flops: int
    steps: int
    samples: int
    seconds: float


def finished(place: Path, model: Any) -> Branch | None:
    """The cost of the training that was finished here, whose weights are put into `model`; None unless it is whole."""
    from safetensors.torch import load_file

    found = distributed.from_main(_done(place) if distributed.is_main() else None)
    if found is not None:
        model.load_state_dict(load_file(place / "model.safetensors"))
    return found


def _done(place: Path) -> Branch | None:
    try:
        facts = strict_json.loads((place / "done.json").read_text())
        whole = file_sha256(place / "model.safetensors") == facts.pop("sha256")
        return Branch(**facts) if whole else None
    except (OSError, ValueError, KeyError, TypeError):  # missing, or damaged: it is trained again
        return None


def rows(place: Path, rows_SB: Tensor) -> Tensor:
    """The batches that the training began with, or these if it begins now: other ranks may round, and draw others."""
    from safetensors.torch import load_file, save_file

    path = place / "rows.safetensors"
    if distributed.is_main() and not path.is_file():
        place.mkdir(parents=True, exist_ok=True)
        with atomic(path) as part:
            save_file({"rows_SB": rows_SB.contiguous()}, part)
    kept: Tensor = distributed.from_main(load_file(path)["rows_SB"] if distributed.is_main() else None)
    return kept


def finish(place: Path, model: Any, cost: Branch) -> None:
    """Keep the weights of a training that is finished, in place of its checkpoints."""
    from safetensors.torch import save_file

    if distributed.is_main():
        path = place / "model.safetensors"
        with atomic(path) as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, part)
        facts = {"sha256": file_sha256(path), **asdict(cost)}
        write_atomically(place / "done.json", (strict_json.dumps(facts) + "\n").encode())
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
    distributed.barrier()
