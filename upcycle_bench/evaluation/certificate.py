"""The certificate: each evaluation proves that it is sound, or ends with one line that says why it is not.

    proof = certify(witness, suites_that_scored, context, file)      # record.CertificatePart, or Unsound

The witness (witness.py) kept a random sample of what the suites encoded. Here the sample is encoded twice more: in
smaller batches, then in batches of another size and in another order. The prediction of an image is its nearest text
of the sample, that of a text its nearest image. Where only one kind was encoded, it is the nearest other input. The
gallery always holds the embeddings of the evaluation. Every prediction must stay the same. Two answers count as the
same where their cosines differ by less than 1e-5, since float32 rounds.

One prediction in 10,000 may differ, and one where there are fewer. Each of them must have its cause in a router: a
token of that input whose k-th and next expert have probabilities within 1e-5 of each other, so that rounding chooses.
An embedding that moves by more than 0.001 counts as a prediction that differs.

The model of the saved file must predict the same, too: what was scored is what a user can load.

Three more checks cover the whole evaluation. No (token, choice) pair was dropped. The tensors of the model did not
change. With labels shuffled, or class names, the suites score at chance (shuffled_labels.py). The certificate names the
suites that train copies of the model and score these, since it says nothing of the copies.

Shape suffixes: N inputs of one kind, Q queries, G gallery.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.evaluation import shuffled_labels
from upcycle_bench.evaluation.features import embed
from upcycle_bench.evaluation.witness import Witness, digests
from upcycle_bench.model import weights
from upcycle_bench.model.measure import router_probabilities
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.record import CertificatePart, RepeatPart
from upcycle_bench.suite import EvalContext, Suite
from upcycle_bench.util.errors import Unsound
from upcycle_bench.util.rng import Stream

MARGIN = 1e-5  # of router probabilities, and of cosines
ALLOWED = 10_000  # predictions of which one may differ
REPEATS = ((7, False), (100, True))  # batch size, shuffled: no batch has the members that it had in the evaluation
RELOADED_BATCH = 64  # of the inputs that the model of the file encodes
MOVED = 1e-3  # an embedding that moves farther counts as another one, whatever it predicts
# transformers adds a method to Module, with its first model, that makes weights: `smart_apply`.
TRUSTED = ("torch", "transformers")


@dataclass(frozen=True)
class Sample:
    """Inputs of one kind, what encodes them, and their embeddings in the evaluation."""

    encode: Any
    rows: list[Tensor]
    before_NC: Tensor


def certify(
    witness: Witness, suites: Mapping[str, Suite], context: EvalContext, file: Path | None = None
) -> CertificatePart | None:
    """The certificate of the evaluation that `witness` watched; None where it saw no batch. Raises Unsound.

    `suites` are those that scored; they score again, with shuffled labels. `file`: where the model is saved, or None.
    """
    began = time.perf_counter()
    context = replace(context, weights="", on_encoded=None, track=lambda items, what: items)
    require_unchanged(witness)
    require_nothing_dropped(witness)
    samples = [Sample(kept.encode, *kept.chosen()) for kept in witness.samples.values() if kept.rows]
    if not samples:
        return None
    repeats = [repeat(witness.model, samples, context, *settings) for settings in REPEATS]
    reloaded = repeat_from_file(witness.model, samples, context, file) if file is not None else None
    tensors = hashlib.sha256("".join(witness.before.values()).encode()).hexdigest()
    controls, uncontrolled = shuffled_labels.score_shuffled(suites, context, tensors)
    return CertificatePart(
        predictions=sum(len(sample.rows) for sample in samples),
        repeats=tuple(repeats),
        reloaded=reloaded,
        choices_routed=sum(routed.choices for routed in witness.routed.values()),
        controls=tuple(controls),
        uncontrolled=uncontrolled,
        uncovered=", ".join(name for name, suite in suites.items() if suite.info.tunes) or None,
        weights=tensors,
        seconds=time.perf_counter() - began,
    )


def require_unchanged(witness: Witness) -> None:
    """Unsound where a tensor of the model is not what it was."""
    before, after = witness.before, digests(witness.model)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise Unsound(f"it changed {len(changed)} tensors of the model, {changed[0]} first; a suite must not train it.")


def require_nothing_dropped(witness: Witness) -> None:
    """Unsound where a gate dropped a choice of a token."""
    for name, routed in witness.routed.items():
        if routed.dropped:
            raise Unsound(
                f"{routed.dropped:,} of {routed.choices:,} choices of tokens were dropped in {name}; "
                "in evaluation capacity has no limit."
            )


def repeat(
    model: nn.Module, samples: Sequence[Sample], context: EvalContext, batch_size: int, shuffled: bool
) -> RepeatPart:
    """Encode the samples again and compare; Unsound where too many predictions differ, or one without a cause."""
    how = (
        f"when the same inputs are encoded again in batches of {batch_size}{', in another order,' if shuffled else ''}"
    )
    return compare(model, samples, context, batch_size, shuffled, how, "Its answers depend on the batch or on order.")


def repeat_from_file(live: nn.Module, samples: Sequence[Sample], context: EvalContext, file: Path) -> RepeatPart:
    """Likewise, by the model of the saved file: Unsound where that is not what was scored.

    A hook, a replaced method, or a cache that another model filled gives answers that the file does not give.
    """
    model = weights.load(file).model.float().to(context.device)
    require_own_code(model)
    again = [reencoded(sample, live, model, context) for sample in samples]
    how = f"from the saved file, {file.name[:16]}"
    why = "What was scored is not what the file holds: its answers come from a hook, a patch or a cache."
    return compare(model, again, context, RELOADED_BATCH, False, how, why)


def reencoded(sample: Sample, live: nn.Module, model: Any, context: EvalContext) -> Sample:
    """The sample, to be encoded by `model` as the evaluation did by `live`."""
    encode, kind = sample.encode, "encode_image" if sample.rows[0].is_floating_point() else "encode_text"
    if getattr(encode, "__self__", None) is live and hasattr(model, encode.__name__):
        return replace(sample, encode=getattr(model, encode.__name__))
    if isinstance(encode, partial) and encode.args == (live,):
        return replace(sample, encode=partial(encode.func, model))
    # A suite's own function, of which `model` has no counterpart: both models encode in the usual way.
    usual = replace(sample, encode=getattr(live, kind))
    return Sample(getattr(model, kind), sample.rows, _encode_again(usual, RELOADED_BATCH, False, context))


def require_own_code(model: nn.Module) -> None:
    """Unsound where a method of the model's classes was replaced: another process would load other code."""
    for kind in dict.fromkeys(each for part in model.modules() for each in type(part).__mro__):
        package = kind.__module__.partition(".")[0]
        for name, function in vars(kind).items():
            if isinstance(function, FunctionType) and function.__module__.partition(".")[0] not in (package, *TRUSTED):
                raise Unsound(
                    f"{function.__module__} replaced {kind.__qualname__}.{name}; who loads the file has another one."
                )


def compare(
    model: nn.Module,
    samples: Sequence[Sample],
    context: EvalContext,
    batch_size: int,
    shuffled: bool,
    how: str,
    why: str,
) -> RepeatPart:
    """Encode the samples and compare with before; Unsound, `how` and `why`, where more differs than may."""
    before = [sample.before_NC for sample in samples]
    again = [_encode_again(sample, batch_size, shuffled, context) for sample in samples]
    distance_N = torch.cat([(one - other).norm(dim=1) for one, other in zip(before, again, strict=True)])
    moved = (~(distance_N <= MOVED)).nonzero().flatten().tolist()  # NaN, too
    differing = sorted({*differences(before, again), *moved})
    inputs = [(sample.encode, row) for sample in samples for row in sample.rows]
    if len(differing) > max(1, len(inputs) // ALLOWED):
        raise Unsound(
            f"{len(differing):,} of {len(inputs):,} predictions come out otherwise {how}; at most 1 in {ALLOWED:,} "
            f"may. {why}"
        )
    margins = []
    for place in differing:
        encode, row = inputs[place]
        margin = routing_margin(model, encode, row, context)
        if not margin < MARGIN:
            what = f"the least routing margin is {margin:.1e}" if math.isfinite(margin) else "there is no router"
            raise Unsound(
                f"a prediction comes out otherwise {how}, and no routing margin below {MARGIN:.0e} explains it "
                f"({what})."
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

    before, again: embeddings [N, C] of one kind or of two. The gallery is always that of `before`, so that a
    difference comes from the query alone. Answers within MARGIN of each other for the query are no difference.
    """
    start = 0
    # The gallery of a kind is the other kind; where there is one kind only, all other inputs of it.
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
    """The least distance between the router probabilities of the k-th and the next expert; infinity without a router.

    It is taken over all MoE layers and all tokens of one input, which is encoded alone.
    """
    least = math.inf

    def at_gate(layer: MoEFFN, x_TD: Tensor) -> None:
        nonlocal least
        probs_TE = router_probabilities(layer.router_weight, x_TD)
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


def _encode_again(sample: Sample, batch_size: int, shuffled: bool, context: EvalContext) -> Tensor:
    """Embeddings [N, C] of `sample.rows`; a batch holds inputs of one shape."""
    rows, order = sample.rows, list(range(len(sample.rows)))
    if shuffled:
        order = torch.randperm(len(order), generator=Stream(("certificate", "order")).generator()).tolist()
    found: dict[int, Tensor] = {}
    by_shape = sorted(order, key=lambda place: rows[place].shape)
    for _, group in groupby(by_shape, key=lambda place: rows[place].shape):
        places = list(group)
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            embedded_BC = embed(sample.encode, torch.stack([rows[place] for place in batch]), context)
            found.update(zip(batch, embedded_BC, strict=True))
    return torch.stack([found[place] for place in range(len(rows))])
