"""Strategies that would have a record they do not deserve, each beside an honest twin: caught, with one line."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from upcycle_bench import record
from upcycle_bench import run as module
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.model.gate import Gate
from upcycle_bench.planning.matrix import Cell, describes
from upcycle_bench.planning.plan import Plan, make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.strategy import FFN, ExtraLoss, LayerInit, Strategy, StrategyInfo, random_router
from upcycle_bench.util.errors import PluginError, Unsound
from upcycle_bench.util.progress import Reporter


def info(name: str) -> StrategyInfo:
    return StrategyInfo(name=name, summary="s", paper="p", status="unpublished")


class Nothing(ExtraLoss):
    """A loss of zero."""

    name: ClassVar[str] = "nothing"

    def __init__(self, layers: Any) -> None:
        self.layer = next(iter(layers.values()))

    def compute(self) -> Tensor:
        return 0.0 * self.layer.router_weight.sum()


@dataclass(frozen=True, kw_only=True)
class Honest(Strategy):
    """Experts are the FFN, scaled apart; its loss leaves the layers as they are."""

    info: ClassVar[StrategyInfo] = info("honest")

    def init_layer(self, ffn: FFN, layer: Any, calibration: Any, rng: Any) -> LayerInit:
        experts = [ffn.expert(w2_DH=ffn.w2_DH * (1 + 0.1 * number)) for number in range(layer.num_experts)]
        return LayerInit(experts, random_router(ffn, layer, rng))

    def loss(self, layers: Any, rng: Any, steps: int) -> ExtraLoss:
        return Nothing(layers)


class PatchedGate(Honest):
    """While it trains it gets at the gates, and leaves them with another function."""

    info: ClassVar[StrategyInfo] = info("patched-gate")

    def loss(self, layers: Any, rng: Any, steps: int) -> ExtraLoss:
        for layer in layers.values():
            layer.gate.forward = lambda x_TD, *rest, gate=layer.gate: Gate.forward(gate, -x_TD)
        return Nothing(layers)


class OtherFeatures(Honest):
    """In evaluation its layers answer with features of a network that is in no file."""

    info: ClassVar[StrategyInfo] = info("other-features")

    def loss(self, layers: Any, rng: Any, steps: int) -> ExtraLoss:
        for layer in layers.values():
            width = layer.router_weight.shape[1]
            other = torch.randn(width, width, generator=rng.child(layer.place.name).generator()) / width**0.5

            def answer(module: Any, args: Any, output: Tensor, other: Tensor = other) -> Tensor | None:
                return None if module.training else args[0] @ other

            layer.register_forward_hook(answer)
        return Nothing(layers)


class Expert(nn.Module):
    """An expert of another form, which is merged into the FFN that it trained."""

    factor = 1

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.base = ffn.resized(self.factor * ffn.hidden).expert()

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.base(x_TD)

    def merged(self) -> nn.Sequential:
        return FFN.of(self.base).expert()


class WideExpert(Expert):
    """Twice as wide as the protocol's, which its strategy does not say."""

    factor = 2


class Adapted(nn.Module):
    """An expert with an adapter that no file describes."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.base, self.adapter = ffn.expert(), nn.Linear(ffn.width, ffn.width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.base(x_TD) + self.adapter(x_TD)


class OfItsOwnForm(Honest):
    """Experts of another form and of the same cost."""

    info: ClassVar[StrategyInfo] = info("own-form")
    form: ClassVar[type[nn.Module]] = Expert

    def init_layer(self, ffn: FFN, layer: Any, calibration: Any, rng: Any) -> LayerInit:
        return LayerInit([self.form(ffn) for _ in range(layer.num_experts)], random_router(ffn, layer, rng))


class Wide(OfItsOwnForm):
    """Experts that cost twice as much."""

    info: ClassVar[StrategyInfo] = info("wide")
    form: ClassVar[type[nn.Module]] = WideExpert


class Undescribed(OfItsOwnForm):
    """Experts that the file does not describe."""

    info: ClassVar[StrategyInfo] = info("undescribed")
    form: ClassVar[type[nn.Module]] = Adapted


class Plugin:
    """Brings them all."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Honest, PatchedGate, OtherFeatures, OfItsOwnForm, Wide, Undescribed]


def plan(strategy: str, quick: list[str]) -> Plan:
    registry = load_registry({"test": Plugin()})
    return make_plan(registry, strategy, load_protocol(registry.get("protocol", "smoke").target, quick))


def run(planned: Plan, results: Path) -> record.Record:
    path = module.run(planned, results, Reporter())
    assert path is not None
    return record.read(path)


def failed(results: Path) -> record.Record:
    (path,) = record.record_paths(results)
    return record.read(path)


def test_honest_plugins_pass(tmp_path: Path, quick: list[str]) -> None:
    for name in ("honest", "own-form"):
        planned = plan(name, quick)
        made = run(planned, tmp_path / name)
        assert made.certificate is not None and made.certificate.reloaded is not None
        assert made.certificate.reloaded.differing == 0
        assert made.protocol.unequal is None
        assert made.protocol.training_fingerprint == planned.training_fingerprint
        assert made.strategy.code is not None and len(made.strategy.code) == 16


@pytest.mark.parametrize("name", ["patched-gate", "other-features"])
def test_a_live_model_that_is_not_the_saved_one_has_no_score(tmp_path: Path, quick: list[str], name: str) -> None:
    with pytest.raises(Unsound, match=r"predictions come out otherwise from the saved file, [0-9a-f]{16}; at most 1"):
        run(plan(name, quick), tmp_path)
    made = failed(tmp_path)
    assert made.status == "failed" and made.scores == [] and made.certificate is None
    assert made.reason is not None and made.reason.endswith("from a hook, a patch or a cache.")


def test_experts_of_another_cost_are_in_the_open_division_whatever_was_declared(
    tmp_path: Path, quick: list[str]
) -> None:
    planned = plan("wide", quick)
    assert planned.unequal is None  # the strategy says nothing of it
    made = run(planned, tmp_path)
    assert made.protocol.division == "open"
    # Three layers of two chosen experts, each with (2 * 64 + 1) * 256 parameters more.
    extra = 3 * 2 * (2 * 64 + 1) * 256
    usual = run(plan("honest", quick), tmp_path / "usual").cost
    assert usual is not None and made.protocol.unequal is not None
    ours, theirs = (f"{number:,}" for number in (usual.parameters_active + extra, usual.parameters_active))
    assert made.protocol.unequal.startswith(f"{ours} active parameters, the protocol's own MoE has {theirs}; ")
    assert made.protocol.unequal.endswith(" forward FLOPs per pair, the protocol's own MoE has 12,508,160")
    assert made.protocol.training_fingerprint != planned.training_fingerprint  # it has a table of its own
    assert describes(made, Cell(plan=planned))  # and is found again by its plan
    built = planned.as_built(made.protocol.unequal)
    assert (built.division, built.training_fingerprint) == ("open", made.protocol.training_fingerprint)


def test_weights_that_no_file_describes_are_refused_before_training(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train_model", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(PluginError) as caught:
        run(plan("undescribed", quick), tmp_path)
    assert str(caught.value) == (
        "undescribed: visual.transformer.resblocks.1.mlp expert 0 is tests.test_wrong_plugins.Adapted(), the file's is "
        "Sequential(). The file of weights could not describe the trained model; give an expert of another form a "
        "merged() that returns a plain FFN (docs/add-a-strategy.md)"
    )
    made = failed(tmp_path)
    assert made.reason == f"PluginError: {caught.value}"
