"""Row 12's children: `python -m tests.bench.first_step imports` ends when torch and DeepSpeed are imported,
`python -m tests.bench.first_step run ARGS` is `upcycle-bench run ARGS` and ends where the first step would begin.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def leave(*_: Any, **__: Any) -> None:
    """End at once: what the process would still tidy up is no part of the way to the first step."""
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        from upcycle_bench.cli import main
        from upcycle_bench.training import loop

        loop.compute_losses = leave  # type: ignore[assignment]
        main()
    else:
        import upcycle_bench.model.deepspeed_import  # noqa: F401  (torch and DeepSpeed, as everything here imports them)

        leave()
