"""One switch for what is only faster: with UPCYCLE_BENCH_PLAIN=1 a training takes the plain twin of every fast path.

| fast path | its plain twin |
| --- | --- |
| `model.padding.encode_text`: the text tower without padding | open_clip's `encode_text` |
| `model.backends.row_multiple`: filler rows, so that few shapes need a kernel | as many rows as are routed |
| `model.precision.attention_kernel`: plain attention for short sequences on a CPU | PyTorch's choice |
| `training.allocator`: freed memory and compiled kernels are kept | nothing is kept |

Both give the same weights to rounding (`tests/training/test_plain.py`). A fast path stays only if it gains 5 % of a
training step of the lab, 3 % for `allocator` (docs/notes/performance.md).
"""

from __future__ import annotations

import os

from upcycle_bench.util.errors import UserError

VARIABLE = "UPCYCLE_BENCH_PLAIN"


def plain() -> bool:
    """Whether UPCYCLE_BENCH_PLAIN is 1; UserError where it is neither 0 nor 1."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise UserError(f"{VARIABLE} must be 0 or 1, not {value!r}.")
    return value == "1"
