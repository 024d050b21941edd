"""The context of an evaluation in the tests of the rooms `evaluation` and `suites`."""

from pathlib import Path
from typing import Any

import torch

from upcycle_bench.model.clip import Clip
from upcycle_bench.suite import EvalContext


def context_of(clip: Clip, root: Path = Path(), **changes: Any) -> EvalContext:
    """That model, in evaluation mode, on the CPU, and the sets below `root`; `changes` are other fields."""
    return EvalContext(
        model=clip.model.eval(),
        tokenizer=clip.tokenize,
        transform=clip.transform,
        root=root,
        device=torch.device("cpu"),
        **changes,
    )
