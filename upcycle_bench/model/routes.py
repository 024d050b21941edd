"""What a gate decides; apart from `gate`, so that who only reads it need not import DeepSpeed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routes(NamedTuple):
    """Where T tokens go; the order of the fields is DeepSpeed's."""

    l_aux: Tensor  # the load-balancing loss, a scalar
    capacity: Tensor  # the most tokens that an expert takes, a scalar
    num_experts: int  # E
    index_KT: Tensor  # the expert of each choice; -1: dropped
    location_KT: Tensor  # the place of each choice in its expert's queue
    gates_KT: Tensor  # the weight of each choice in the output, float32 or wider; 0: dropped
    counts_E: Tensor  # the choices of each expert, those dropped included
