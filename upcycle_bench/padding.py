"""Text padding, which takes no part in MoE layers (and, in training, in hardly anything: `upcycle_bench.packed`).

Shape suffixes: B batch, L sequence, P = B * L positions, T tokens (padding left out), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.rows import select_rows


class Padding:
    """Which text positions carry a token: known when the token embedding is called, used by every text MoE layer.

    Positions behind the end-of-text token cannot influence CLIP's text feature (causal attention, pooled at that
    token), so they would only eat expert capacity; they are left out before the gate and get no MoE output.
    """

    def __init__(self, end_of_text: int | None = None) -> None:
        self.end_of_text = end_of_text  # None: the end-of-text token is the highest id (CLIP's tokenizer)
        self.keep_T: Tensor | None = None
        self.position_P: Tensor | None = None

    @classmethod
    def of(cls, model: Any) -> Padding | None:
        """What follows the padding of that CLIP; None where it pools elsewhere or attends to what comes later."""
        pool = getattr(model, "text_pool_type", None)
        if pool not in ("argmax", "eos") or model.attn_mask is None:
            return None
        return cls(model.text_eos_id if pool == "eos" else None)

    def end_positions(self, text_BL: Tensor) -> Tensor:
        """Where each caption ends, [B]."""
        marks_BL = text_BL if self.end_of_text is None else (text_BL == self.end_of_text).int()
        return marks_BL.argmax(1)

    def observe(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the token embedding; args[0] is text_BL."""
        text_BL = args[0]
        end_B = self.end_positions(text_BL)
        keep_P = (torch.arange(text_BL.shape[1], device=text_BL.device) <= end_B[:, None]).flatten()
        self.keep_T = keep_P.nonzero().squeeze(1)
        self.position_P = torch.where(keep_P, keep_P.cumsum(0) - 1, len(self.keep_T))

    def compact(self, x_PD: Tensor) -> Tensor:
        """[B*L, D] -> the T rows that carry a token."""
        assert self.keep_T is not None and self.position_P is not None, "the token embedding was not called"
        return select_rows(x_PD, self.keep_T, self.position_P[None], inverse_holes=True)

    def expand(self, y_TD: Tensor) -> Tensor:
        """The inverse of `compact`, zeros at padding."""
        assert self.keep_T is not None and self.position_P is not None
        return select_rows(y_TD, self.position_P, self.keep_T[None], index_holes=True)
