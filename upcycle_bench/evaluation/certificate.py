"""The certificate: each evaluation proves that it is sound, or ends with one line that says why it is not.

    with Witness(model) as witness:                           # the model as it is scored, in evaluation mode
        context = EvalContext(..., on_encoded=witness.on_encoded)
        results = {name: suite.evaluate(context) for name, suite in suites.items()}
    proof = witness.testify(suites_that_scored, context)      # record.CertificatePart, or Unsound

While suites encode, the witness keeps a random sample of images and of texts with their embeddings: a tenth of each
kind, at least 128 and at most 512. Afterwards it encodes the sample twice more: in smaller batches, then in batches of
another size and in another order. The prediction of a kept image is its nearest kept text, that of a kept text its
nearest kept image; where only one kind was encoded, it is the nearest other input. The gallery is always what the
evaluation encoded. Every prediction must stay the same. Answers whose cosines are within 1e-5 of each other count as
the same, since float32 rounds.

Of all predictions 1 in 10,000 may differ, and one where there are fewer. Each of these must have a cause in the router:
a token of that input whose k-th and next expert have router probabilities within 1e-5, so that rounding picks. An
embedding that moves by more than 0.001 counts as a prediction that differs.

Three more checks cover the whole evaluation. No (token, choice) pair is dropped. The tensors of the model are the same
before and after. The suites' own pipeline is at chance with shuffled labels (control.py). The certificate names the
suites that train copies of the model and score these; of the copies it says nothing.

Shape suffixes: N inputs of one kind, Q queries, G gallery.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.evaluation import shuffled_labels
from upcycle_bench.evaluation.features import embed
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.record import CertificatePart, RepeatPart
from upcycle_bench.suite import EvalContext, Suite
from upcycle_bench.util.errors import Unsound
from upcycle_bench.util.flops import uncounted
from upcycle_bench.util.rng import Stream

LEAST, MOST, SHARE = 128, 512, 10  # of what was encoded of a kind, one in SHARE is encoded again, within these bounds
MARGIN = 1e-5  # of router probabilities, and of cosines
ALLOWED = 10_000  # predictions of which one may differ
REPEATS = ((7, False), (100, True))  # batch size, shuffled: no batch has the members that it had in the evaluation
MOVED = 1e-3  # distance from which an embedding counts as another one, whatever it predicts


@dataclass
class Reservoir:
    """A reservoir of one kind of input (Vitter's algorithm R): rows, their embeddings, and what last encoded them."""

    generator: torch.Generator
    encode: Any = None
    seen: int = 0
    rows: list[Tensor] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)

    def add(self, encode: Any, inputs: Tensor, embedded_BC: Tensor) -> None:
        self.encode = encode
        draws = torch.rand(len(inputs), generator=self.generator, dtype=torch.float64).tolist()
        for place, draw in enumerate(draws):
            self.seen += 1
            slot = len(self.rows) if len(self.rows) < MOST else int(draw * self.seen)
            if slot < MOST:
                self.rows[slot : slot + 1] = [inputs[place].clone()]
                self.embeddings[slot : slot + 1] = [embedded_BC[place].clone()]

    def chosen(self) -> tuple[list[Tensor], Tensor | None]:
        """The inputs to encode again, each once, and their embeddings [N, C]."""
        number = min(MOST, max(LEAST, self.seen // SHARE))
        order = torch.randperm(len(self.rows), generator=self.generator).tolist()[:number]
        once = {_key(self.rows[place]): place for place in order}
        if not once:
            return [], None
        return [self.rows[place] for place in once.values()], torch.stack([self.embeddings[p] for p in once.values()])


class Witness:
    """Watches an evaluation of `model`, as the module docstring says. It ignores batches of other models."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.samples = {kind: Reservoir(Stream(("certificate", kind)).generator()) for kind in ("images", "texts")}
        self._routed: dict[str, _Routed] = {}
        self._handles: list[Any] = []
        self._before: dict[str, str] = {}

    def __enter__(self) -> Witness:
        self._before = digests(self.model)
        for name, layer in moe_layers(self.model).items():
            self._routed[name] = _Routed()
            self._handles.append(layer.gate.register_forward_hook(self._routed[name].count))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @uncounted()
    def on_encoded(self, model: nn.Module, encode: Any, inputs: Tensor, embedded_BC: Tensor) -> None:
        """Sample a batch of images (floating) or texts (integers) with their normalised embeddings on the CPU."""
        if model is self.model:
            self.samples["images" if inputs.is_floating_point() else "texts"].add(encode, inputs, embedded_BC)

    def testify(self, suites: Mapping[str, Suite], context: EvalContext) -> CertificatePart | None:
        """The certificate; None where no suite let it see anything. Raises Unsound. `suites` are those that scored."""
        began = time.perf_counter()
        context = replace(context, weights="", on_encoded=None, track=lambda items, what: items)
        self._unchanged()
        self._nothing_dropped()
        kept = [sample for sample in self.samples.values() if sample.rows]
        if not kept:
            return None
        first = [sample.chosen() for sample in kept]
        repeats = [self._repeat(kept, first, context, *repeat) for repeat in REPEATS]
        controls, uncontrolled = shuffled_labels.score_shuffled(suites, context)
        return CertificatePart(
            predictions=sum(len(rows) for rows, _ in first),
            repeats=tuple(repeats),
            choices_routed=sum(routed.choices for routed in self._routed.values()),
            controls=tuple(controls),
            uncontrolled=uncontrolled,
            uncovered=", ".join(name for name, suite in suites.items() if suite.info.tunes) or None,
            weights=hashlib.sha256("".join(self._before.values()).encode()).hexdigest(),
            seconds=time.perf_counter() - began,
        )

    def _unchanged(self) -> None:
        after = digests(self.model)
        changed = [name for name in {**self._before, **after} if self._before.get(name) != after.get(name)]
        if changed:
            raise Unsound(
                f"it changed {len(changed)} tensors of the model, {changed[0]} first; a suite must not train it."
            )

    def _nothing_dropped(self) -> None:
        for name, routed in self._routed.items():
            if routed.dropped:
                raise Unsound(
                    f"{routed.dropped:,} of {routed.choices:,} choices of tokens were dropped in {name}; "
                    "in evaluation capacity has no limit."
                )

    def _repeat(
        self,
        kept: Sequence[Reservoir],
        first: Sequence[tuple[list[Tensor], Any]],
        context: EvalContext,
        batch_size: int,
        shuffled: bool,
    ) -> RepeatPart:
        how = f"in batches of {batch_size}{', in another order,' if shuffled else ''}"
        rows = [row for sampled, _ in first for row in sampled]
        encoders = [sample.encode for sample, (sampled, _) in zip(kept, first, strict=True) for _ in sampled]
        before = [embedded_NC for _, embedded_NC in first]
        again = []
        for sample, (sampled, _) in zip(kept, first, strict=True):
            order = list(range(len(sampled)))
            if shuffled:
                order = torch.randperm(len(order), generator=Stream(("certificate", "order")).generator()).tolist()
            again.append(_encode(sample.encode, sampled, order, batch_size, context))
        distance_N = torch.cat([(one - other).norm(dim=1) for one, other in zip(before, again, strict=True)])
        moved = (~(distance_N <= MOVED)).nonzero().flatten().tolist()  # NaN, too
        differing = sorted({*differences(before, again), *moved})
        predictions = len(rows)
        if len(differing) > max(1, predictions // ALLOWED):
            raise Unsound(
                f"{len(differing):,} of {predictions:,} predictions come out otherwise when the same inputs are "
                f"encoded again {how}; at most 1 in {ALLOWED:,} may. Its answers depend on the batch or on order."
            )
        margins = []
        for place in differing:
            margin = routing_margin(self.model, encoders[place], rows[place], context)
            if not margin < MARGIN:
                what = f"the least routing margin is {margin:.1e}" if math.isfinite(margin) else "there is no router"
                raise Unsound(
                    f"a prediction comes out otherwise when the same inputs are encoded again {how}, and no routing "
                    f"margin below {MARGIN:.0e} explains it ({what})."
                )
            margins.append(margin)
        return RepeatPart(
            batch_size=batch_size,
            shuffled=shuffled,
            differing=len(differing),
            margins=tuple(margins),
            largest_distance=float(distance_N.max()),
        )


def differences(before: Sequence[Tensor], again: Sequence[Tensor]) -> Iterable[int]:
    """The queries, counted through all kinds of inputs, whose prediction differs.

    before, again: embeddings [N, C] of one kind or of two. The gallery is always that of `before`,
    so that a difference is the query's own. Answers within MARGIN of each other for the query are no difference.
    """
    start = 0
    # the gallery of a kind is the other kind; where there is one kind only, all others of it
    for query, gallery in [(0, 0)] if len(before) == 1 else [(0, 1), (1, 0)]:
        old_QG, new_QG = (parts[query].double() @ before[gallery].double().T for parts in (before, again))
        if query == gallery:
            old_QG.fill_diagonal_(-1)
            new_QG.fill_diagonal_(-1)
        old_Q1, new_Q1 = old_QG.argmax(1, keepdim=True), new_QG.argmax(1, keepdim=True)
        old_lead_Q1 = old_QG.gather(1, old_Q1) - old_QG.gather(1, new_Q1)
        new_lead_Q1 = new_QG.gather(1, new_Q1) - new_QG.gather(1, old_Q1)
        differ_Q = (torch.maximum(old_lead_Q1, new_lead_Q1) >= MARGIN).flatten()
        yield from (start + place for place in differ_Q.nonzero().flatten().tolist())
        start += len(old_QG)


def routing_margin(model: nn.Module, encode: Any, row: Tensor, context: EvalContext) -> float:
    """The least distance between the router probabilities of the k-th and the next expert, over the tokens of one
    input, encoded alone, and all MoE layers; infinity where there is none."""
    least = math.inf

    def at_gate(layer: MoEFFN, x_TD: Tensor) -> None:
        nonlocal least
        probs_TE = torch.softmax(x_TD.float() @ layer.gate.wg.weight.float().T, dim=1)
        if layer.gate.k < probs_TE.shape[1]:
            top_TK = probs_TE.topk(layer.gate.k + 1, dim=1).values
            least = min(least, float((top_TK[:, -2] - top_TK[:, -1]).min()))

    layers = moe_layers(model).values()
    handles = [
        layer.gate.register_forward_pre_hook(lambda _, args, layer=layer: at_gate(layer, args[0])) for layer in layers
    ]
    try:
        embed(encode, row[None], context)
    finally:
        for handle in handles:
            handle.remove()
    return least


def digests(model: nn.Module) -> dict[str, str]:
    """sha256 of every tensor of the model's state: its type, shape and bytes."""
    found = {}
    for name, value in model.state_dict().items():
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}\0".encode() + data.tobytes()).hexdigest()
    return found


@dataclass
class _Routed:
    """How many choices a gate made and dropped. A small object of its own: a copied model has its hooks copied."""

    made: list[tuple[int, Tensor]] = field(default_factory=list)

    def count(self, _gate: nn.Module, _args: Any, output: tuple[Any, ...]) -> None:
        index_KT = output[3]
        self.made.append((index_KT.numel(), (index_KT < 0).sum()))  # summed up at the end: a GPU need not wait

    @property
    def choices(self) -> int:
        return sum(choices for choices, _ in self.made)

    @property
    def dropped(self) -> int:
        return sum(int(dropped) for _, dropped in self.made)


def _encode(encode: Any, rows: Sequence[Tensor], order: list[int], batch_size: int, context: EvalContext) -> Tensor:
    """Embeddings [N, C] in the order of `rows`, encoded in that of `order`; inputs of one shape stand in a batch."""
    found: dict[int, Tensor] = {}
    by_shape = sorted(order, key=lambda place: rows[place].shape)
    for _, group in groupby(by_shape, key=lambda place: rows[place].shape):
        places = list(group)
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            embedded_BC = embed(encode, torch.stack([rows[place] for place in batch]), context)
            found.update(zip(batch, embedded_BC, strict=True))
    return torch.stack([found[place] for place in range(len(rows))])


def _key(row: Tensor) -> bytes:
    """Equal inputs have equal embeddings: among them the nearest would be a matter of rounding."""
    return hashlib.sha256(f"{tuple(row.shape)}".encode() + row.contiguous().cpu().numpy().tobytes()).digest()
