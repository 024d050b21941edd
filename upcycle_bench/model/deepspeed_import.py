"""The one door to DeepSpeed: import it from here, so that it finds its device quietly and builds nothing.

DeepSpeed prints to stdout at import and warns on machines without a GPU, and on a CPU it would compile a small
shared-memory extension at its first collective, and die without a compiler. It is switched off; gloo does the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import defaultdict

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Its log handler binds stdout at import: stdout is for results, and a progress bar may stand for stderr just then.
with contextlib.redirect_stdout(sys.__stderr__ or sys.stderr):
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate, _capacity, top2gating
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
if os.environ["DS_ACCELERATOR"] == "cpu":
    vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)

capacity = _capacity

__all__ = ["MOELayer", "MoE", "TopKGate", "capacity", "deepspeed", "top2gating"]
