"""The one place that imports DeepSpeed, so that it finds its device, prints nothing and compiles nothing.

    from upcycle_bench.model.deepspeed_import import MoE, MOELayer, TopKGate    # DeepSpeed's, or their plain twins
    engine = require_deepspeed().initialize(...)[0]                             # UserError where it is not installed

DeepSpeed prints to stdout at import and warns on machines without a GPU. On a CPU it would compile a shared-memory
extension at its first collective, and fail without a compiler. That extension is switched off: gloo does its work.

Training needs DeepSpeed. A model is loaded and scored without it, by the plain modules of `plain_moe`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import defaultdict
from typing import Any

import torch

from upcycle_bench.model import plain_moe
from upcycle_bench.util.errors import UserError

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
_why_not = ""
try:
    # Its log handler keeps the stdout of the import. Stdout is for results, and `sys.stderr` may be a progress bar's.
    with contextlib.redirect_stdout(sys.__stderr__ or sys.stderr):
        import deepspeed
        from deepspeed.moe.layer import MoE
        from deepspeed.moe.sharded_moe import MOELayer, TopKGate
        from deepspeed.moe.sharded_moe import _capacity as capacity
except ImportError as error:
    deepspeed, _why_not = None, " ".join(str(error).split())
    MoE, MOELayer, TopKGate, capacity = plain_moe.MoE, plain_moe.MOELayer, plain_moe.TopKGate, plain_moe.capacity
else:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if os.environ["DS_ACCELERATOR"] == "cpu":
        vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)

__all__ = ["MOELayer", "MoE", "TopKGate", "capacity", "deepspeed", "require_deepspeed"]


def require_deepspeed() -> Any:
    """The module deepspeed. UserError where it cannot be imported."""
    if deepspeed is None:
        raise UserError(f"training needs DeepSpeed ({_why_not}): pip install 'deepspeed>=0.19.8,<0.20'.")
    return deepspeed
