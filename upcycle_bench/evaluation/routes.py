"""Where a model sends images and texts: what every router and expert does in evaluation, item by item.

    routed = route_images(evalsets, context)              # items are images; with route_texts they are texts
    routed.layers["vision.3"].first_IE                    # tokens of each item by their most probable expert

All tokens of an image count, the class token included. Of a text the tokens up to its end count. The batch size changes
nothing but the rounding of matrix products.

Shape suffixes: I items.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.evaluation.features import embed, finite
from upcycle_bench.model import padding
from upcycle_bench.model.measure import compactness_of_moments, expert_cosine, router_probabilities
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.padding import Padding
from upcycle_bench.model.routes import Routes
from upcycle_bench.suite import EvalContext


class LayerRoutes:
    """What one MoE layer did with all items so far, in their order.

    Sums over tokens: `routed_E` tokens routed to each expert, `probability_E` their probabilities. Sums over the rows
    that experts put out: `rows_E` their number, `sum_ED` their sum, `second_DD` their second moment.
    """

    def __init__(self, layer: MoEFFN) -> None:
        experts, width = layer.router_weight.shape
        like: dict[str, Any] = {"dtype": torch.float64, "device": layer.router_weight.device}
        self.layer = layer
        self.tokens, self.choices, self.dropped, self.entropy = 0, 0, 0, 0.0
        self.routed_E, self.probability_E = torch.zeros(experts, **like), torch.zeros(experts, **like)
        self.rows_E, self.sum_ED = torch.zeros(experts, **like), torch.zeros(experts, width, **like)
        self.second_DD = torch.zeros(width, width, **like)
        self._first: list[Tensor] = []
        self._mean: list[Tensor] = []

    @property
    def first_IE(self) -> np.ndarray:
        """How many tokens of each item have each expert as their most probable one."""
        return torch.cat(self._first).numpy()

    @property
    def mean_IE(self) -> np.ndarray:
        """The router's mean probability of each expert over the tokens of each item."""
        return torch.cat(self._mean).numpy()

    @property
    def load_E(self) -> np.ndarray:
        """The share of the (token, choice) pairs that each expert gets; they sum to 1."""
        return (self.routed_E / self.routed_E.sum()).cpu().numpy()

    @property
    def routing_probability(self) -> list[float | None]:
        """The mean probability of each expert over the tokens routed to it; None: no token."""
        pairs = zip(self.probability_E.tolist(), self.routed_E.tolist(), strict=True)
        return [total / tokens if tokens else None for total, tokens in pairs]

    def numbers(self) -> dict[str, float]:
        """Name -> value; the relative compactness is left out where the experts' means coincide."""
        load_E = self.load_E
        found = {
            "expert_cosine": expert_cosine(self.layer.experts),
            "router_entropy": self.entropy / self.tokens,
            "utilisation_min": float(load_E.min()),
            "utilisation_max": float(load_E.max()),
            "load_variation": float(load_E.std() / load_E.mean()),
            "dead_experts": float((load_E == 0).sum()),
            "tokens_dropped": self.dropped / self.choices,
        }
        # DeepSpeed's own layer (UPCYCLE_BENCH_EXPERTS=deepspeed) does not show the rows of its experts.
        seen = bool(self.rows_E.any())
        compactness = compactness_of_moments(self.rows_E, self.sum_ED, self.second_DD) if seen else None
        return found if compactness is None else found | {"relative_compactness": compactness}

    def gate_saw(self, x_TD: Tensor, routes: Routes, lengths_B: Tensor) -> None:
        """Add a batch: the gate's input, what the gate returned, and how many of the T tokens each item has."""
        index_KT = routes.index_KT.long()
        probs_TE = router_probabilities(self.layer.router_weight, x_TD)
        self.tokens += len(x_TD)
        self.choices += index_KT.numel()
        self.dropped += int((index_KT < 0).sum())
        self.entropy += float(-torch.special.xlogy(probs_TE, probs_TE).double().sum())
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, probs_TE.topk(len(index_KT), dim=1).indices, 1)
        self.routed_E += chosen_TE.double().sum(0)
        self.probability_E += (probs_TE * chosen_TE).double().sum(0)
        first_TE = torch.zeros_like(probs_TE).scatter_(1, probs_TE.argmax(1, keepdim=True), 1)
        item_T = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B).to(x_TD.device)
        empty_BE = probs_TE.new_zeros(len(lengths_B), probs_TE.shape[1], dtype=torch.float64)  # one row an item
        self._first.append(empty_BE.index_add(0, item_T, first_TE.double()).long().cpu())
        mean_BE = empty_BE.index_add(0, item_T, probs_TE.double()) / lengths_B[:, None].to(x_TD.device)
        self._mean.append(mean_BE.float().cpu())

    def expert_made(self, expert: int, out_RD: Tensor) -> None:
        """Add the rows that an expert put out."""
        out_RD = out_RD.double()
        self.rows_E[expert] += len(out_RD)
        self.sum_ED[expert] += out_RD.sum(0)
        self.second_DD += out_RD.T @ out_RD


@dataclass(frozen=True)
class Routed:
    """The MoE layers of one tower, by name, and the labels of the I items that they saw.

    `labels`: "class" and "set" -> int64 [I], -1 where an item has none.
    """

    layers: dict[str, LayerRoutes]
    labels: dict[str, np.ndarray]


def route_images(evalsets: Iterable[EvalSet], context: EvalContext) -> Routed:
    """Route all images of the sets. Classes of one name are one class; images of a retrieval set have none."""
    model: Any = context.model
    items = _Items()
    with _watch(model, "vision") as watching:
        for place, evalset in enumerate(evalsets):
            for images_B3HW, beside in context.track(evalset.batches, f"{evalset.name}: images"):
                watching.lengths_of = partial(_evenly, len(images_B3HW))
                finite(embed(model.encode_image, images_B3HW, context), evalset.name)
                for each in beside:
                    items.add(evalset.classnames[int(each)] if evalset.kind == "classification" else None, place)
    return Routed(watching.layers, items.labels())


def route_texts(evalsets: Iterable[EvalSet], context: EvalContext) -> Routed:
    """Route the captions of retrieval sets, and the prompts of other sets, each different prompt once.

    Captions have no class; prompts have no set.
    """
    model: Any = context.model
    items, texts, prompts = _Items(), [], set()
    for place, evalset in enumerate(evalsets):
        if evalset.kind == "retrieval":
            for text in (text for _, captions in evalset.batches for each in captions for text in each):
                items.add(None, place)
                texts.append(text)
            continue
        for name in evalset.classnames:
            for prompt in {template.format(c=name): None for template in evalset.templates}:
                if prompt not in prompts:
                    prompts.add(prompt)
                    items.add(name, -1)
                    texts.append(prompt)
    encode = padding.text_encoder(model)
    ends = Padding.of(model)
    with _watch(model, "text") as watching:
        for start in context.track(range(0, len(texts), context.batch_size), "texts"):
            text_BL = context.tokenizer(texts[start : start + context.batch_size])
            lengths_B = ends.end_positions(text_BL) + 1 if ends else torch.full((len(text_BL),), text_BL.shape[1])
            watching.lengths_of = partial(_as_they_are, lengths_B)
            finite(embed(encode, text_BL, context), "texts")
    return Routed(watching.layers, items.labels())


class _Items:
    """The class and the set of every item, as numbers; -1 for none."""

    def __init__(self) -> None:
        self.classes: dict[str, int] = {}
        self.rows: list[tuple[int, int]] = []

    def add(self, name: str | None, place: int) -> None:
        self.rows.append((-1 if name is None else self.classes.setdefault(name, len(self.classes)), place))

    def labels(self) -> dict[str, np.ndarray]:
        class_I, set_I = np.array(self.rows, dtype=np.int64).reshape(-1, 2).T
        return {"class": class_I, "set": set_I}


@dataclass
class _Watching:
    """The layers of a tower. `lengths_of`: from T to the number of tokens [B] of each item in the current batch."""

    layers: dict[str, LayerRoutes]
    lengths_of: Callable[[int], Tensor]

    def at_gate(self, routes: LayerRoutes, _gate: nn.Module, args: tuple[Tensor, ...], output: Routes) -> None:
        routes.gate_saw(args[0], output, self.lengths_of(len(args[0])))


@contextlib.contextmanager
def _watch(model: nn.Module, tower: str) -> Iterator[_Watching]:
    """Hooks on the gates and experts of one tower, which are removed at the end."""
    layers = {name: LayerRoutes(layer) for name, layer in moe_layers(model).items() if layer.place.tower == tower}
    watching = _Watching(layers, partial(_evenly, 1))
    handles = []
    for routes in layers.values():
        handles.append(routes.layer.gate.register_forward_hook(partial(watching.at_gate, routes)))
        handles.append(routes.layer.compute.register_forward_hook(partial(_at_experts, routes)))
    model.eval()
    try:
        yield watching
    finally:
        for handle in handles:
            handle.remove()


def _at_experts(routes: LayerRoutes, _compute: nn.Module, args: tuple[Any, ...], out_RD: Tensor) -> None:
    for number, own_RD in enumerate(args[2].by_expert(out_RD)):
        routes.expert_made(number, own_RD)


def _evenly(items: int, tokens: int) -> Tensor:
    return torch.full((items,), tokens // items)


def _as_they_are(lengths_B: Tensor, tokens: int) -> Tensor:
    assert int(lengths_B.sum()) == tokens
    return lengths_B
