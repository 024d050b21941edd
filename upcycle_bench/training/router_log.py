"""What the routers do in training: numbers for each MoE layer, in the lines of metrics.

    with watch(layers) as seen:          # around one forward pass in training
        loss = ...
    seen.summary()                       # {"vision.1": {"load": [...], "router_entropy": 1.9, ...}, ...}

Each number is over the tokens of this rank's batch, for one layer:

    load                  share of the (token, choice) pairs for each expert, before capacity
    router_entropy        entropy of the softmax over all experts in nats, mean over tokens
    routing_probability   for each expert, its mean probability over the tokens that chose it; None without a token
    expert_cosine         mean pairwise cosine of the experts' parameters, after the step; None where ranks hold parts
    relative_compactness  `model.measure.relative_compactness` of the experts' outputs; None where it is not defined

They are the quantities of figures 4, 5 and B.1 to B.4 of arXiv:2604.13508. Watching draws no random number and changes
no number of the training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.model.measure import expert_cosine, relative_compactness, router_probabilities
from upcycle_bench.model.moe import MoEFFN


@contextlib.contextmanager
def watch(layers: Mapping[str, MoEFFN]) -> Iterator[Watched]:
    """Observe the forward pass of each layer inside the block."""
    watched = Watched({name: _Seen(layer) for name, layer in layers.items()})
    try:
        yield watched
    finally:
        for seen in watched.seen.values():
            seen.close()


class Watched:
    """What was seen of each layer."""

    def __init__(self, seen: dict[str, _Seen]) -> None:
        self.seen = seen

    def summary(self) -> dict[str, dict[str, Any]]:
        """The numbers of the module docstring by layer name, rounded to five digits."""
        return {name: seen.summary() for name, seen in self.seen.items() if seen.input_TD is not None}


class _Seen:
    """The hooks on one layer, and what they saw of its last forward pass."""

    def __init__(self, layer: MoEFFN) -> None:
        self.layer = layer
        self.input_TD: Tensor | None = None
        self.router_ED = self.counts_E = torch.empty(0)
        self.out_RD: tuple[Tensor, ...] = ()  # [R, D] for each expert; empty where DeepSpeed's own layer computes
        self.handles = [
            layer.compute.register_forward_hook(self._rows),
            layer.moe.register_forward_hook(self._leave),
        ]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _rows(self, _module: nn.Module, args: tuple[Any, ...], out_RD: Tensor) -> None:
        self.out_RD = args[2].by_expert(out_RD.detach())

    def _leave(self, _module: nn.Module, args: tuple[Tensor, ...], output: tuple[Any, ...]) -> None:
        # Only stored here: a computation inside the step would count as FLOPs of the training.
        self.input_TD, self.counts_E = args[0].detach(), output[2]
        self.router_ED = self.layer.router_weight.detach().clone()

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        assert self.input_TD is not None
        probs_TE = router_probabilities(self.router_ED, self.input_TD)
        entropy = -torch.special.xlogy(probs_TE, probs_TE).sum(1).mean()
        routed_TE = torch.zeros_like(probs_TE).scatter_(1, probs_TE.topk(self.layer.gate.k, dim=1).indices, 1)
        chance_E = (probs_TE * routed_TE).sum(0) / routed_TE.sum(0)  # nan where no token chose the expert
        load_E = self.counts_E.double() / self.counts_E.sum()
        compactness = relative_compactness(self.out_RD) if self.out_RD else None
        return {
            "load": [round(share, 5) for share in load_E.tolist()],
            "router_entropy": round(float(entropy), 5),
            "routing_probability": [None if p != p else round(p, 5) for p in chance_E.tolist()],
            "expert_cosine": round(expert_cosine(self.layer.experts), 5) if self.layer.settings.ep_size == 1 else None,
            "relative_compactness": None if compactness is None else float(f"{compactness:.5g}"),
        }
