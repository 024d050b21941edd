"""Our top-2 routing against DeepSpeed's own function: every output and gradient, to the bit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import threads
from tests.moe_helpers import create_layer, settings_of
from upcycle_bench.model import gate as gate_module
from upcycle_bench.model.deepspeed_import import top2gating
from upcycle_bench.model.top2 import top2


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 60),
    experts=st.integers(2, 9),
    slots=st.sampled_from([None, 1, 3, 10, 1000]),
    kind=st.sampled_from(["random", "ties", "equal", "sharp"]),
)
def test_it_is_deepspeeds_to_the_bit(seed: int, tokens: int, experts: int, slots: int | None, kind: str) -> None:
    torch.manual_seed(seed)
    logits_TE = torch.randn(tokens, experts)
    if kind == "ties":
        logits_TE = logits_TE.round()
    if kind == "equal":
        logits_TE = logits_TE[:1].repeat(tokens, 1)
    if kind == "sharp":
        logits_TE = logits_TE * 100  # second probabilities that are zero
    weight_KT = torch.randn(2, tokens)

    def theirs(given_TE: Tensor) -> tuple[Tensor, ...]:
        # The factor slots * E / (2 T), less half a slot, which DeepSpeed rounds up.
        factor = 1.0 if slots is None else (slots - 0.5) * experts / (2 * tokens)
        return top2gating(given_TE, factor, 0, slots is not None, None, False, sparse_routes=True)

    def ours(given_TE: Tensor) -> tuple[Tensor, ...]:
        return top2(given_TE, None if slots is None else torch.tensor(slots))

    results = []
    with threads(1):
        for route in (ours, theirs):
            leaf_TE = logits_TE.clone().requires_grad_()
            l_aux, capacity, number, index_KT, location_KT, gates_KT, counts_E = route(leaf_TE)
            assert number == experts
            ((gates_KT * weight_KT).sum() + l_aux).backward()
            results.append([l_aux, capacity, index_KT, location_KT, gates_KT, counts_E, leaf_TE.grad])
    for name, mine, stock in zip(
        ("l_aux", "capacity", "index", "location", "gates", "counts", "grad"), *results, strict=True
    ):
        assert torch.equal(mine, stock), name
    assert results[0][2].dtype == results[1][2].dtype


def test_no_tokens() -> None:
    for capacity in (None, torch.tensor(4)):
        _, _, _, index_KT, location_KT, gates_KT, counts_E = top2(torch.zeros(0, 3), capacity)
        assert index_KT.shape == location_KT.shape == gates_KT.shape == (2, 0)
        assert counts_E.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("top_k", "sampling", "expected"), [(2, False, True), (1, False, False), (3, False, False), (2, True, False)]
)
def test_what_is_not_top_2_goes_to_deepspeed(
    top_k: int, sampling: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Tensor] = []
    gate = create_layer(8, settings_of(4, top_k), torch.float32).gate.train()
    gate.second_expert_sampling = sampling

    def spy(logits_TE: Tensor, capacity: Tensor | None) -> tuple[Any, ...]:
        called.append(logits_TE)
        return top2(logits_TE, capacity)

    monkeypatch.setattr(gate_module, "top2", spy)
    gate(torch.randn(20, 8))
    assert bool(called) == expected
