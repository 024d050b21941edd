"""Arrays that a model's weights gave, in the cache under all that can change them.

    arrays = remembered(["images", digest, split], context, make)         # make() -> {"features": ..., "labels": ...}

The key is `what`, the weights' hash (`EvalContext.weights`; without one nothing is kept) and what arithmetic depends
on to the last bit. A file is read with its check sums: one that is damaged is said, deleted and made anew.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle_bench import expert_backends
from upcycle_bench.cache import build_once, cache_root
from upcycle_bench.suite import EvalContext

VERSION = 2  # raise it when the same weights and inputs would give other arrays
Arrays = Mapping[str, np.ndarray]


def remembered(what: Sequence[Any], context: EvalContext, make: Callable[[], Arrays]) -> Arrays:
    """What `make` gives, from the cache if these weights have made it before. `what` is JSON, and says which inputs."""
    if not context.weights:  # nobody knows what these are
        return make()
    key = json.dumps([VERSION, what, context.weights, _arithmetic(context)])
    path = cache_root() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"

    def build(staging: Path) -> None:
        with staging.open("wb") as file:
            np.savez(file, **make())  # type: ignore[arg-type]

    if path.exists():
        try:
            return _read(path)
        except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
            warnings.warn(f"{path} is damaged ({error}); it is made anew.", stacklevel=2)
            path.unlink(missing_ok=True)
    return _read(build_once(path, build))


def _read(path: Path) -> Arrays:
    """All arrays of the file; zipfile compares each with its check sum."""
    with np.load(path) as arrays:
        return dict(arrays)


def _arithmetic(context: EvalContext) -> list[Any]:
    """What moves the last bits of an embedding; the batch, too, since matrix products depend on their shapes."""
    cuda = context.device.type == "cuda"
    processor = torch.cuda.get_device_name(context.device) if cuda else torch.backends.cpu.get_cpu_capability()
    precision = torch.get_float32_matmul_precision()
    threads = None if cuda else torch.get_num_threads()
    backend = expert_backends.forced()
    return [torch.__version__, context.device.type, processor, precision, threads, backend, context.batch_size]
