"""What a built model costs, whatever its modules are: active parameters, and FLOPs of one image-text pair.

    cost = model_cost(model)            # needs all experts in this process

A strategy may declare a cost, but what its model has is counted: one pair goes through it, in evaluation mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from upcycle_bench.model.backends import forcing
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.model.towers import context_length, image_size, image_weight, text_pooling, vocab_size
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
    weight, (pooled, eos) = image_weight(model), text_pooling(model)
    image = torch.zeros(1, 3, *image_size(model), dtype=weight.dtype, device=weight.device)
    text = torch.ones(1, context_length(model), dtype=torch.long, device=weight.device)
    text[0, -1] = eos if pooled == "eos" else vocab_size(model) - 1  # so the text has no padding
    was_training = model.training
    model.eval()
    with forcing("loop"), counted_flops() as counter:  # DeepSpeed's layer would pad rows
        model.encode_image(image)
        model.encode_text(text)
    model.train(was_training)
    return Cost(parameter_counts(model)[1], counter.get_total_flops())
