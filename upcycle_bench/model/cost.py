"""What a built model costs, whatever its modules are: active parameters, and FLOPs of one image-text pair.

    cost = model_cost(model)            # needs all experts in this process

A strategy may declare a cost, but what its model has is counted: one pair goes through it, in evaluation mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from upcycle_bench.model.backends import forcing
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.util.flops import counted_flops


class Cost(NamedTuple):
    """Parameters used for a token, and FLOPs of the forward pass of one pair, its text at full length."""

    parameters: int
    flops: int


@torch.no_grad()
def model_cost(model: Any) -> Cost:
    """The cost of `model`, which stays in its mode.

    Each expert computes the rows that are routed to it, so FLOPs do not depend on the routes.
    """
    weight, (height, width) = model.visual.conv1.weight, model.visual.image_size
    image = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
    text = torch.ones(1, model.context_length, dtype=torch.long, device=weight.device)
    end = model.text_eos_id if model.text_pool_type == "eos" else model.vocab_size - 1
    text[0, -1] = end  # so the text has no padding
    was_training = model.training
    model.eval()
    with forcing("loop"), counted_flops() as counter:  # DeepSpeed's layer would pad rows
        model.encode_image(image)
        model.encode_text(text)
    model.train(was_training)
    return Cost(parameter_counts(model)[1], counter.get_total_flops())
