"""Reading what torch wrote without running anything that stands in it.

value = load_data(Path("epoch_15.pt"))             # torch.save
tensors, quick_gelu = load_script(Path("ViT-B-32.pt"))    # torch.jit.save, as OpenAI's
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.util.errors import UserError

# What trainings put beside the weights. All of it is data: making it calls nothing that a file could choose.
# NumPy's modules were renamed in version 2, and a file names them as they were where it was written.
_DATA: list[Any] = [
    *[(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")],
    *[(np.zeros(1).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")],
    np.ndarray,
    np.dtype,
    *[kind for kind in vars(np.dtypes).values() if isinstance(kind, type) and issubclass(kind, np.dtype)],
    argparse.Namespace,
    types.SimpleNamespace,
    (lambda *_: {}, "collections.defaultdict"),  # a dict: torch fills no others
    *[(pathlib.PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath")],
    *[(pathlib.PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath")],
    *[(kind, f"builtins.{kind.__name__}") for kind in (dict, list, int, float)],  # what it makes
]


def load_data(path: Path) -> Any:
    """What torch.save wrote, by torch's reader of data: it makes tensors, containers, what `_DATA` lists, nothing else.

    Where it can, it maps the file into memory: an optimiser, twice the weights, is then not read.
    """
    try:
        with torch.serialization.safe_globals(_DATA), path.open("rb") as file:
            mapped = zipfile.is_zipfile(file) and path.suffix != ".safetensors"  # which torch.load takes at its word
            file.seek(0)
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        text = " ".join(str(error).split())
        text = text.partition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0] or text
        named = re.search(r"GLOBAL ([\w.]+)", text)
        if named is None:  # torch's own line advises to switch its safety off
            raise ValueError(text) from None
        raise UserError(
            f"{path} holds Python objects ({named[1]}), whose code is never run here; where they can be trusted, load "
            "them and save the weights alone: torch.save(model.state_dict(), FILE)."
        ) from None


def load_script(path: Path) -> tuple[dict[str, Tensor], bool | None]:
    """The weights of a scripted or traced model, with the activation that its code shows.

    Its code is TorchScript, no Python, and loading runs none of it but `__setstate__`, which no CLIP has.
    """
    with zipfile.ZipFile(path) as archive:
        code = b"".join(archive.read(name) for name in archive.namelist() if re.search(r"/code/.*\.py$", name))
    if b"__setstate__" in code:
        raise UserError(f"{path} is a TorchScript archive that runs code as it loads: give a state dict.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        state = dict(torch.jit.load(path, map_location="cpu").state_dict())
    for name in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's archives have them beside the weights
        state.pop(name, None)
    quick, plain = b"torch.sigmoid(" in code, b"torch.gelu(" in code  # QuickGELU is x * sigmoid(1.702 x)
    return state, quick if quick != plain else None
