"""Both towers of a CLIP at once, where the training leaves a core free: text beside vision, forwards and backwards.

    image_BD, text_BD, drew = both(encode_images, encode_texts, at_once=not drew)   # functions without arguments
    engine.backward(apart(loss, model))                                             # not engine.backward(loss)

An operation is computed by as many threads as ever, so every number is the same to the bit. What is gained is the time
of the shorter tower: a fifth of a step of the lab, whose protocol has one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from upcycle_bench.expert_backends import plain
from upcycle_bench.moe import moe_layers
from upcycle_bench.threads import spare_thread

T = TypeVar("T")


def both(first: Callable[[], T], second: Callable[[], T], *, at_once: bool) -> tuple[T, T, bool]:
    """(first(), second(), whether PyTorch's random numbers were drawn), `at_once` if there is a spare thread.

    What draws should not be called at once: the order would be a matter of chance. Where that is seen too late, both
    are called again, one after the other (and what counts their calls counts twice).
    """
    thread = spare_thread() if at_once else None
    before = torch.get_rng_state()
    if thread is not None:
        later = thread.submit(second)
        try:
            results = first(), later.result()
        finally:
            if not later.cancel():
                wait([later])
        if torch.equal(torch.get_rng_state(), before):
            return *results, False
        torch.set_rng_state(before)
    results = first(), second()
    return *results, not torch.equal(torch.get_rng_state(), before)


def separable(model: nn.Module) -> bool:
    """Whether each expert is a plain FFN with parameters of its own, so that threads cannot change what autocast does.

    It casts a weight once and keeps that until any thread leaves autocast: a weight that is used again may then be cast
    again, and its gradients are added in another precision.
    """
    experts = [expert for layer in moe_layers(model).values() for expert in layer.experts]
    parameters = [id(parameter) for expert in experts for parameter in expert.parameters()]
    return all(map(plain, experts)) and len(set(parameters)) == len(parameters)


def apart(loss: Tensor, model: Any) -> Tensor:
    """The loss, with a backward pass for `visual` and the logit scale here, and for all else in the spare thread.

    `loss` itself where no core is free, or all trained parameters are on one side. Its gradient must lead to
    parameters of `model` (an open_clip CLIP) alone. What the forward pass saved is kept until both passes are over.
    """
    thread = spare_thread()
    if thread is None:
        return loss
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    here = [value for name, value in trained.items() if name.startswith("visual.") or name == "logit_scale"]
    there = [value for name, value in trained.items() if not (name.startswith("visual.") or name == "logit_scale")]
    if not here or not there:
        return loss
    anchor = torch.zeros((), requires_grad=True)  # autograd asks for the gradient of something
    made: Tensor = _Apart.apply(anchor, _Passes(loss, thread, here, there, model))
    return made


class _Passes:
    """What `_Apart` needs; in an object, so that autograd does not see the loss and go on into it."""

    def __init__(
        self, loss: Tensor, thread: Executor, here: Sequence[Tensor], there: Sequence[Tensor], model: nn.Module
    ) -> None:
        self.loss, self.thread, self.here, self.there, self.model = loss, thread, here, there, model

    def run(self, grad: Tensor, parameters: Sequence[Tensor]) -> None:
        # Both passes go through what the towers have in common, so neither may free it.
        torch.autograd.backward(self.loss, grad, retain_graph=True, inputs=list(parameters))


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: _Passes) -> Tensor:
        ctx.passes = passes
        return passes.loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        passes: _Passes = ctx.passes
        ctx.passes = None
        later = passes.thread.submit(passes.run, grad, passes.there)
        try:
            passes.run(grad, passes.here)
            later.result()
        finally:  # an error here is not replaced by one there
            if not later.cancel():
                wait([later])
            for layer in moe_layers(passes.model).values():
                layer.forget_graph()
        return None, None
