"""What the routers do while they train: a line of numbers per MoE layer beside the loss, every `log_every` steps.

    with watch(layers) as seen:          # around one forward pass in training
        loss = ...
    seen.summary()                       # {"vision.1": {"load": [...], "router_entropy": 1.9, ...}, ...}

Per layer, over the tokens of this rank's batch: `load`, the share of the (token, choice) pairs per expert, before
capacity; `router_entropy`, the mean over tokens of the full softmax's entropy in nats; `routing_probability`, the mean
probability of an expert over the tokens that chose it (None: no token); `expert_cosine`, the mean pairwise cosine of
the experts' parameters after the step; `relative_compactness`, below. These are the quantities of figures 4, 5 and B.1
to B.4 of arXiv:2604.13508. Watching draws nothing and changes no number of the training.

Shape suffixes: T tokens, D width, N experts, R rows routed to one expert,
A axes between experts.
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
    """Observe the next forward pass of each layer, until the block ends."""
    watched = Watched({name: _Seen(layer) for name, layer in layers.items()})
    try:
        yield watched
    finally:
        for seen in watched.seen.values():
            seen.close()


class Watched:
    """What was seen of every layer."""

    def __init__(self, seen: dict[str, _Seen]) -> None:
        self.seen = seen

    def summary(self) -> dict[str, dict[str, Any]]:
        """Numbers by layer name, with five digits."""
        return {name: seen.summary() for name, seen in self.seen.items() if seen.input_TD is not None}


class _Seen:
    def __init__(self, layer: MoEFFN) -> None:
        self.layer = layer
        self.input_TD: Tensor | None = None
        self.router_ND = self.counts_N = torch.empty(0)
        self.out_RD: tuple[Tensor, ...] = ()  # by expert; none where DeepSpeed's layer computes them
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
        # Only kept here: what is computed inside the step would count as FLOPs of the training.
        self.input_TD, self.counts_N = args[0].detach(), output[2]
        self.router_ND = self.layer.router_weight.detach().clone()

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        assert self.input_TD is not None
        probs_TN = router_probabilities(self.router_ND, self.input_TD)
        entropy = -torch.special.xlogy(probs_TN, probs_TN).sum(1).mean()
        routed_TN = torch.zeros_like(probs_TN).scatter_(1, probs_TN.topk(self.layer.gate.k, dim=1).indices, 1)
        chance_N = (probs_TN * routed_TN).sum(0) / routed_TN.sum(0)  # nan: no token
        load_N = self.counts_N.double() / self.counts_N.sum()
        compactness = relative_compactness(self.out_RD) if self.out_RD else None
        return {
            "load": [round(share, 5) for share in load_N.tolist()],
            "router_entropy": round(float(entropy), 5),
            "routing_probability": [None if p != p else round(p, 5) for p in chance_N.tolist()],
            "expert_cosine": round(expert_cosine(self.layer.experts), 5) if self.layer.settings.ep_size == 1 else None,
            "relative_compactness": None if compactness is None else float(f"{compactness:.5g}"),
        }
