"""The backends against a reference that goes token by token, and the choice between them."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from tests.helpers import threads
from tests.moe_helpers import assert_gradients, create_layer, relative_error, settings_of
from upcycle_bench.model import backends
from upcycle_bench.model.backends import BACKENDS, VARIABLE, default, refusal, row_multiple
from upcycle_bench.model.dispatch import Compute, Layout
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.planning.machine import checks
from upcycle_bench.training import finished, session
from upcycle_bench.training.router_log import watch
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.flops import FlopCounter

WIDTH, HIDDEN, EXPERTS, TOKENS = 16, 24, 5, 40
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    backends.say_once.cache_clear()
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("error")  # no backend falls back unless a test expects it
        yield


def layer_of(top_k: int, factor: float, *, hidden: int = HIDDEN, act: type[nn.Module] = nn.GELU) -> MoEFFN:
    layer = create_layer(WIDTH, settings_of(EXPERTS, top_k, factor), torch.float32, hidden=hidden)
    for expert in layer.experts:
        expert.gelu = act()
    return layer.train()


def tokens_of(kind: str) -> Tensor:
    x_TD = torch.randn(TOKENS, WIDTH)
    return (x_TD[:1].repeat(TOKENS, 1) if kind == "equal" else x_TD).requires_grad_()


def token_by_token(layer: MoEFFN, x_TD: Tensor) -> Tensor:
    """y_t = sum over its surviving choices of gate * expert(x_t), one token at a time."""
    routes = layer.gate(x_TD)
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros(WIDTH)
        for k in range(len(routes.index_KT)):
            if (number := int(routes.index_KT[k, t])) >= 0:
                y_D = y_D + routes.gates_KT[k, t] * layer.experts[number](x_D)
        rows.append(y_D)
    return torch.stack(rows)


def gradients(layer: MoEFFN, y_TD: Tensor, x_TD: Tensor) -> list[Tensor]:
    weight_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(9))
    leaves = [x_TD, *layer.parameters()]
    found = torch.autograd.grad((y_TD.float() * weight_TD).sum(), leaves, allow_unused=True)
    # The reference never calls an idle expert. A backend must give it gradients of zeros, for the optimiser's sake.
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


@pytest.mark.parametrize(("top_k", "act"), [(1, nn.GELU), (2, QuickGELU), (3, nn.GELU)])
@pytest.mark.parametrize(("tokens", "factor"), [("random", 0.4), ("random", 8.0), ("equal", 8.0), ("equal", 0.3)])
def test_outputs_and_gradients_are_those_token_by_token(
    act: type[nn.Module], top_k: int, tokens: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small factors drop choices, equal tokens leave experts without rows; in float32 and under bf16 autocast."""
    torch.manual_seed(top_k)
    layer, x_TD = layer_of(top_k, factor, act=act), tokens_of(tokens)
    index_KT = layer.gate(x_TD).index_KT
    assert bool((index_KT < 0).any()) == (factor < 1)
    assert (len(index_KT.unique()) < EXPERTS) == (tokens == "equal")
    expected_TD = token_by_token(layer, x_TD)
    expected = gradients(layer, expected_TD, x_TD)

    for name in BACKENDS:
        monkeypatch.setenv(VARIABLE, name)
        y_TD = layer(x_TD[None])[0]
        assert relative_error(y_TD, expected_TD) <= 1e-5
        assert_gradients(gradients(layer, y_TD, x_TD), expected, 1e-5)
        idle = torch.autograd.grad(layer(x_TD[None]).sum(), list(layer.experts.parameters()), allow_unused=True)
        assert all(grad is not None for grad in idle)

        with torch.autocast("cpu", torch.bfloat16):
            y_TD = layer(x_TD[None])[0]
        assert relative_error(y_TD.float(), expected_TD) <= 2e-2
        assert_gradients(gradients(layer, y_TD, x_TD), expected, 5e-2)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends called, in order."""
    calls: list[str] = []

    def spy(name: str, backend: Any) -> Any:
        def call(*args: Any) -> Tensor:
            calls.append(name)
            return backend(*args)

        return call

    for name in ("loop", "grouped_mm"):
        monkeypatch.setattr(backends, name, spy(name, getattr(backends, name)))
    return calls


@pytest.mark.parametrize("name", BACKENDS)
def test_a_forced_backend_is_the_one_that_computes(name: str, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    layer_of(2, 2.0)(tokens_of("random")[None])
    assert used == ([] if name == "deepspeed" else [name])  # DeepSpeed's layer calls neither


def test_a_cpu_runs_experts_one_by_one(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: each expert on its block, one after the other."""

    def one_by_one(_self: Compute, experts: Any, rows_RD: Tensor, layout: Layout) -> Tensor:
        assert layout.block_sizes == layout.counts  # too few rows for filler rows
        return torch.cat([expert(rows) for expert, rows in zip(experts, rows_RD.split(layout.counts), strict=True)])

    torch.manual_seed(0)
    layer, x_TD = layer_of(2, 0.7), tokens_of("random")
    for precision in (torch.float32, torch.bfloat16):
        results = []
        for forward in (Compute.forward, one_by_one):
            with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=precision != x_TD.dtype):
                patch.setattr(Compute, "forward", forward)
                y_TD = layer(x_TD[None])[0]
            assert y_TD.dtype == precision
            results.append([y_TD, *gradients(layer, y_TD, x_TD)])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert used == ["loop"] * 2


def many_rows() -> tuple[MoEFFN, Tensor]:
    """A layer, and tokens of which each expert gets about 100 rows."""
    torch.manual_seed(0)
    return layer_of(2, 1.1), torch.randn(256, WIDTH, requires_grad=True)


def test_filler_rows_in_bf16_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are those without filler rows, for plain and for other experts."""
    layer, x_TD = many_rows()
    seen: list[list[int]] = []
    layer.compute.register_forward_hook(lambda _module, args, _out: seen.append(args[2].block_sizes))
    for other in (False, True):
        if other:
            layer.experts[0].gelu.register_forward_hook(lambda *_: None)  # so that its modules are called
        results = []
        for fills in (True, False):
            with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
                if not fills:
                    patch.setattr(backends, "row_multiple", lambda rows, mean: 1)
                y_TD = layer(x_TD[None])[0]
            results.append([y_TD, *gradients(layer, y_TD, x_TD)])
        filled, exact = seen[-2:]
        assert filled != exact and all(0 <= a - b < 2 and a % 2 == 0 for a, b in zip(filled, exact, strict=True))
        assert all(relative_error(a, b) <= 1e-6 for a, b in zip(*results, strict=True))
    layer(x_TD[None])
    assert seen[-1] == exact  # float32 has no filler rows


def test_filler_rows_grow_with_the_rows_of_an_expert() -> None:
    rows = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert [row_multiple(rows, mean) for mean in (0, 31, 32, 63, 64, 512, 2176)] == [1, 1, 1, 1, 2, 16, 64]
    assert row_multiple(rows.float(), 2176) == 1
    with FlopCounter():
        assert row_multiple(rows, 2176) == 1  # filler rows are no work


def test_router_log_and_flops_do_not_depend_on_filler_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_TD = many_rows()
    summaries, flops = [], []
    for fills in (True, False):
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            if not fills:
                patch.setattr(backends, "row_multiple", lambda rows, mean: 1)
            with watch({"vision.1": layer}) as seen:
                layer(x_TD[None])
            with FlopCounter() as counter:
                layer(x_TD[None]).sum().backward()
        summaries.append(seen.summary()["vision.1"])
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    compactness = [summary.pop("relative_compactness") for summary in summaries]
    assert compactness[0] == pytest.approx(compactness[1], rel=1e-4)
    assert summaries[0] == summaries[1]


def test_autocast_leaves_float64_alone() -> None:
    layer, x_TD = layer_of(2, 2.0).double(), tokens_of("random").double()
    expected_TD = layer(x_TD[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x_TD[None]), expected_TD)


def test_the_rows_of_an_expert_are_no_filler_rows() -> None:
    layer, x_TD = many_rows()
    rows: list[tuple[int, list[int]]] = []

    def at_experts(_module: nn.Module, args: tuple[Any, ...], out_RD: Tensor) -> None:
        rows.append((len(out_RD), [len(own_RD) for own_RD in args[2].by_expert(out_RD)]))

    layer.eval().compute.register_forward_hook(at_experts)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer(x_TD[None])
    (total, own), counts_E = rows[0], layer.gate(x_TD).counts_E
    assert own == counts_E.tolist() and sum(own) == 2 * len(x_TD) < total


def test_the_default_goes_by_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert default(CPU) == default(CPU, torch.float32) == "loop"
    for capability, expected in (((8, 0), "loop"), ((9, 0), "grouped_mm"), ((12, 0), "grouped_mm")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert default(cuda) == expected
        assert default(cuda, torch.float32) == "loop"
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")  # an older torch
    assert default(cuda) == "loop"


def test_what_grouped_mm_cannot_take_is_looped_over_and_said_once(
    used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(2, 2.0, hidden=6)  # 24 bytes in float32
    x_TD = tokens_of("random")
    expected_TD = layer(x_TD[None])
    monkeypatch.setenv(VARIABLE, "grouped_mm")
    with pytest.warns(UserWarning, match="a width of 16 or 6 in torch.float32 is no multiple of 16 bytes") as said:
        found = [layer(x_TD[None]) for _ in range(3)]
    assert len(said) == 1 and used == ["loop"] * 4
    assert all(torch.equal(y_TD, expected_TD) for y_TD in found)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, rows_RD = layer_of(2, 2.0).experts, torch.randn(6, WIDTH)
    assert refusal(experts, rows_RD) is None
    assert refusal(experts, rows_RD[:0]) == "no row is routed"
    assert refusal(copy.deepcopy(experts).double(), rows_RD.double()) == "it does not compute in torch.float64"

    class Own(nn.Sequential):
        """A strategy's own class of expert: the same children, but another forward is possible."""

    class Scaled(nn.GELU):
        """An activation with a number that its description does not show."""

    for expert, scale in zip(experts, range(EXPERTS), strict=True):
        expert.gelu = Scaled()
        expert.gelu.scale = scale
    assert refusal(experts, rows_RD) == "the experts are not plain FFNs with one activation"
    for expert in experts:
        expert.gelu.scale = 1
    assert refusal(experts, rows_RD) is None
    experts = layer_of(2, 2.0).experts

    not_plain = "the experts are not plain FFNs with one activation"
    for change in (
        lambda expert: Own(OrderedDict(expert.named_children())),
        lambda expert: nn.Sequential(expert.c_fc, expert.gelu, expert.c_proj),
        lambda expert: expert.__setattr__("gelu", nn.GELU(approximate="tanh")) or expert,
        lambda expert: expert.c_fc.__setattr__("bias", None) or expert,
        lambda expert: expert.register_forward_hook(lambda *_: None) and expert,
        lambda expert: expert.c_fc.register_full_backward_hook(lambda *_: None) and expert,
        lambda expert: expert.__setattr__("forward", lambda x: x) or expert,
        lambda expert: expert.__setattr__("gelu", Scaled()) or expert,
    ):
        changed = copy.deepcopy(experts)
        changed[2] = change(changed[2])
        assert refusal(changed, rows_RD) == not_plain
    changed = copy.deepcopy(experts)
    changed[2] = layer_of(2, 2.0, hidden=32).experts[0]
    assert refusal(changed, rows_RD) == "the experts differ in size"
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert refusal(experts, rows_RD) == f"torch {torch.__version__} has no grouped_mm"


def test_what_is_watched_and_counted_does_not_depend_on_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x_TD = layer_of(2, 0.7), tokens_of("random")
    summaries, flops = {}, {}
    for name in ("loop", "grouped_mm"):
        monkeypatch.setenv(VARIABLE, name)
        with FlopCounter() as counter, watch({"vision.1": layer}) as seen:
            (layer(x_TD[None]).square().sum() + layer.l_aux).backward()
        summaries[name], flops[name] = seen.summary()["vision.1"], counter.get_total_flops()
    assert flops["loop"] == flops["grouped_mm"] > 0
    compactness = [summary.pop("relative_compactness") for summary in summaries.values()]
    assert compactness[0] == pytest.approx(compactness[1], rel=1e-4)
    assert summaries["loop"] == summaries["grouped_mm"]


def test_an_unknown_name_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "groupedmm")
    with (
        pytest.raises(UserError, match=r"'groupedmm': did you mean 'grouped_mm'.*Or unset it"),
        session.open_session(1),
    ):
        pass
    found = next(check for check in checks() if check.name == "experts")
    assert not found.ok and found.remedy == f"unset {VARIABLE}"


def test_doctor_and_record_name_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = finished.key_of("run", CPU)
    assert backends.machine(CPU)["experts"] == "loop"
    monkeypatch.setenv(VARIABLE, "grouped_mm")
    assert backends.machine(CPU)["experts"] == "grouped_mm"
    assert next(check.found for check in checks() if check.name == "experts") == f"grouped_mm, forced by {VARIABLE}"
    assert finished.key_of("run", CPU) != usual  # a training with another backend is another training
