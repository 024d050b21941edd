"""Embeddings in the cache: computed once for each file of weights, under a key of all that can change them.

    arrays = remembered(["images", digest, split], context, make, again)  # make() -> {"features": ..., "labels": ...}

The key holds `what`, the hash of the weights (`EvalContext.weights`; without one nothing is cached) and all that
changes the last bits of the arithmetic. A file is read with its check sums; a damaged one is deleted with a warning and
made anew. Where a witness watches, some rows, drawn at random, are encoded again; if they differ, the evaluation is
unsound.

Shape suffixes: N rows of the cache.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from upcycle_bench.model import backends
from upcycle_bench.suite import EvalContext
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import build_once, cache_root
from upcycle_bench.util.environment import installed_version
from upcycle_bench.util.errors import Unsound
from upcycle_bench.util.plain import plain
from upcycle_bench.util.rng import Stream

VERSION = 2  # raise it when the same weights and inputs would give other arrays
SPOT = 128  # cached rows that are encoded again, to compare
Arrays = Mapping[str, np.ndarray]


def remembered(
    what: Sequence[Any], context: EvalContext, make: Callable[[], Arrays], again: Callable[[Sequence[int]], Arrays]
) -> Arrays:
    """The arrays that `make` returns, from the cache if these weights have made them before.

    `what` (JSON) names the inputs. `again` encodes the rows of these numbers again, of the arrays that are embeddings.
    Where a witness watches (`EvalContext.on_encoded`), cached rows that differ from these raise Unsound.
    """
    if not context.weights:  # the key could not tell these arrays from another model's
        return make()
    key = strict_json.dumps([VERSION, what, context.weights, _arithmetic(context)])
    path = cache_root() / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"

    def build(staging: Path) -> None:
        with staging.open("wb") as file:
            np.savez(file, **make())  # type: ignore[arg-type]

    if path.exists():
        try:
            arrays = _read(path)
        except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
            warnings.warn(f"{path} is damaged ({error}); it is made anew.", stacklevel=2)
            path.unlink(missing_ok=True)
        else:
            if context.on_encoded is not None:
                rows = _spot(arrays, path)
                _compare(arrays, rows, again(rows), path)
            return arrays
    return _read(build_once(path, build))


def _read(path: Path) -> Arrays:
    """All arrays of the file; zipfile compares each with its check sum."""
    with np.load(path) as arrays:
        return dict(arrays)


def _spot(arrays: Arrays, path: Path) -> list[int]:
    """The numbers of at most SPOT rows, from anywhere: a file may begin with rows that are right."""
    order_N = torch.randperm(len(next(iter(arrays.values()))), generator=Stream(("spot", path.stem)).generator())
    return sorted(order_N[:SPOT].tolist())


def _compare(arrays: Arrays, rows: Sequence[int], again: Arrays, path: Path) -> None:
    """Unsound where more than one row in a hundred differs by 0.001: a near tie in a router may let one differ."""
    for name, fresh_NC in again.items():
        distance_N = np.linalg.norm(arrays[name][rows] - fresh_NC, axis=1)
        if int((~(distance_N <= 1e-3)).sum()) > max(1, len(fresh_NC) // 100):  # NaN differs, too
            raise Unsound(f"{path} holds embeddings that its model does not give; delete it.")


def _arithmetic(context: EvalContext) -> list[Any]:
    """All that moves the last bits of an embedding, or its pixels.

    The batch size is part of it, since matrix products depend on their shapes. open_clip is part of it, since it builds
    the towers, and the transform out of torchvision and Pillow.
    """
    cuda = context.device.type == "cuda"
    processor = torch.cuda.get_device_name(context.device) if cuda else torch.backends.cpu.get_cpu_capability()
    precision = torch.get_float32_matmul_precision()
    threads = None if cuda else torch.get_num_threads()
    backend = backends.forced()
    versions = [torch.__version__, *map(installed_version, ("open_clip_torch", "torchvision", "pillow"))]
    fused = torch.backends.mha.get_fastpath_enabled()
    numerics = [context.device.type, processor, precision, threads, backend, fused, context.batch_size]
    numerics += ["plain"] if plain() else []
    return [*versions, *numerics, _pixels(context.transform)]


def _pixels(transform: Callable[[Any], torch.Tensor]) -> str:
    """Hash of what a transform makes of one picture with gradients and edges, neither square nor of a tower's size."""
    y_HW, x_HW = np.mgrid[:240, :320]
    picture_HW3 = np.stack([3 * x_HW, 5 * y_HW, x_HW * y_HW // 16], axis=2) % 256
    pixels_3HW = transform(Image.fromarray(picture_HW3.astype(np.uint8)))
    described = f"{pixels_3HW.dtype} {list(pixels_3HW.shape)}".encode()
    return hashlib.sha256(described + pixels_3HW.contiguous().numpy().tobytes()).hexdigest()
