"""The one place that imports DeepSpeed, so that it finds its device, prints nothing and compiles nothing.

DeepSpeed prints to stdout at import and warns on machines without a GPU. On a CPU it would compile a shared-memory
extension at its first collective, and fail without a compiler. That extension is switched off: gloo does its work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import defaultdict

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Its log handler keeps the stdout of the import. Stdout is for results, and `sys.stderr` may be a progress bar's.
with contextlib.redirect_stdout(sys.__stderr__ or sys.stderr):
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate, _capacity, top2gating
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
if os.environ["DS_ACCELERATOR"] == "cpu":
    vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)

capacity = _capacity

__all__ = ["MOELayer", "MoE", "TopKGate", "capacity", "deepspeed", "top2gating"]
