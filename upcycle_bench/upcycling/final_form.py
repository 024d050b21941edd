"""Refuse, before anything is trained, a strategy whose trained model its file of weights could not describe.

    require_describable(strategy, clip, dense, steps, pairs)       # PluginError, one line

Such a model cannot be scored again or used by anybody. Without this check that showed after hours of training. A
strategy may train experts of another form, and change them stage by stage: what counts is the form that training ends
with. A copy of the model therefore goes through the strategy's stages, without their steps, and is merged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import Tensor

from upcycle_bench.model import rebuild
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import merge
from upcycle_bench.strategy import Strategy
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import PluginError

PAIRS = 8  # that both encode


def require_describable(
    strategy: Strategy, model: Any, dense: Any, steps: int, pairs: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """PluginError, on every rank, where `weights.load` would not rebuild what training makes of `model`.

    `pairs` are some training pairs, which the model and what the file describes encode alike. Under expert parallelism
    only forms are compared. Every rank must call it.
    """
    model = _trained_form(strategy, model, steps)
    reason = rebuild.unlike_its_file(model, dense)
    whole = all(layer.settings.ep_size == 1 for layer in moe_layers(model).values())
    if reason is None and whole:
        images, texts = next(islice(pairs, 1))
        reason = rebuild.other_answers(model, dense, images[:PAIRS], texts[:PAIRS])
    if distributed.sum_over_ranks(reason is not None):
        raise PluginError(
            f"{strategy.info.name}: {reason or 'another rank says why'}. The file of weights could not describe the "
            "trained model; give an expert of another form a merged() that returns a plain FFN (docs/add-a-strategy.md)"
        )


def _trained_form(strategy: Strategy, model: Any, steps: int) -> Any:
    """The form in which the model will be saved: itself, or a copy that went through the stages and was merged."""
    stages = strategy.stages(steps) if strategy.trains else ()
    experts = [expert for layer in moe_layers(model).values() for expert in layer.experts]
    if not stages and not any(hasattr(expert, "merged") for expert in experts):
        return model
    model = copy.deepcopy(model)
    for _ in stages:
        strategy.next_stage(moe_layers(model))
    merge(model)
    return model
