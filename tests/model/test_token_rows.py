"""Gathers of token rows against plain indexing and `index_add`, outputs and gradients, with and without holes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from upcycle_bench.model.dispatch import lay_out
from upcycle_bench.model.token_rows import combine_rows, select_rows

SIZES = {
    "seed": st.integers(0, 2**31),
    "tokens": st.integers(1, 12),
    "width": st.integers(1, 5),
    "choices": st.integers(1, 4),
    "kept": st.sampled_from([0.0, 0.3, 0.8, 1.0]),
}
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def routing(tokens: int, choices: int, kept: float) -> tuple[Tensor, Tensor]:
    """(the choice of each row [R], the row of each choice [K, T]; R: dropped) of random choices in a random order."""
    chosen = (torch.rand(choices * tokens) < kept).nonzero().squeeze(1)
    choice_R = chosen[torch.randperm(len(chosen))]
    slots_KT = torch.full((choices, tokens), len(choice_R))
    for row, choice in enumerate(choice_R.tolist()):
        slots_KT[choice // tokens, choice % tokens] = row
    return choice_R, slots_KT


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Those of a weighted sum of the output, with the same random weights at each call."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad((output * weights).sum(), inputs)


@EXAMPLES
@given(**SIZES)
def test_select_rows_is_indexing(seed: int, tokens: int, width: int, choices: int, kept: float) -> None:
    torch.manual_seed(seed)
    choice_R, slots_KT = routing(tokens, choices, kept)
    x_TD = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    index_R = choice_R % tokens
    actual = select_rows(x_TD, index_R, slots_KT, inverse_holes=len(choice_R) < slots_KT.numel())
    expected = x_TD[index_R]
    assert torch.equal(actual, expected)
    assert_close(gradients(actual, x_TD), gradients(expected, x_TD), rtol=1e-13, atol=1e-13)


@EXAMPLES
@given(**{name: SIZES[name] for name in ("seed", "tokens", "width", "kept")})
def test_compacting_and_expanding_is_a_mask(seed: int, tokens: int, width: int, kept: float) -> None:
    """As `Padding` does it: the kept rows in order, and back with zeros between them."""
    torch.manual_seed(seed)
    keep_P = torch.rand(tokens) < kept
    keep_T = keep_P.nonzero().squeeze(1)
    position_P = torch.where(keep_P, keep_P.cumsum(0) - 1, len(keep_T))
    x_PD = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)

    compact_TD = select_rows(x_PD, keep_T, position_P[None], inverse_holes=True)
    assert torch.equal(compact_TD, x_PD[keep_P])
    assert torch.equal(*(gradients(y_TD, x_PD)[0] for y_TD in (compact_TD, x_PD[keep_P])))

    y_TD = torch.randn(len(keep_T), width, dtype=torch.float64, requires_grad=True)
    expanded_PD = select_rows(y_TD, position_P, keep_T[None], index_holes=True)
    expected_PD = torch.zeros(tokens, width, dtype=torch.float64).index_add(0, keep_T, y_TD)
    assert torch.equal(expanded_PD, expected_PD)
    assert torch.equal(*(gradients(z_PD, y_TD)[0] for z_PD in (expanded_PD, expected_PD)))


@EXAMPLES
@given(**SIZES)
def test_combine_rows_is_a_weighted_index_add(seed: int, tokens: int, width: int, choices: int, kept: float) -> None:
    torch.manual_seed(seed)
    choice_R, slots_KT = routing(tokens, choices, kept)
    rows_RD = torch.randn(len(choice_R), width, dtype=torch.float64, requires_grad=True)
    gates_KT = torch.rand(choices, tokens, dtype=torch.float64, requires_grad=True)
    actual = combine_rows(rows_RD, gates_KT, slots_KT, choice_R, holes=len(choice_R) < slots_KT.numel())
    weighted_RD = rows_RD * gates_KT.flatten()[choice_R, None]
    expected = torch.zeros(tokens, width, dtype=torch.float64).index_add(0, choice_R % tokens, weighted_RD)
    assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    ours, theirs = (gradients(y_TD, rows_RD, gates_KT) for y_TD in (actual, expected))
    assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert (ours[1][slots_KT == len(choice_R)] == 0).all()  # a dropped choice's gate moves nothing


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_gradcheck(kept: float) -> None:
    torch.manual_seed(0)
    choice_R, slots_KT = routing(5, 2, kept)
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows_RD = torch.randn(len(choice_R), 3, dtype=torch.float64, requires_grad=True)
    gates_KT = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    holes = len(choice_R) < slots_KT.numel()
    assert torch.autograd.gradcheck(
        lambda x: select_rows(x, choice_R % 5, slots_KT, inverse_holes=holes), (x_TD,), check_undefined_grad=False
    )
    assert torch.autograd.gradcheck(
        lambda rows, gates: combine_rows(rows, gates, slots_KT, choice_R, holes=holes),
        (rows_RD, gates_KT),
        check_undefined_grad=False,
    )


def test_combine_rows_accumulates_bfloat16_in_the_gates_precision() -> None:
    # 1 + 2^-9 needs more than bfloat16's 8 bits: a sum in bfloat16 would lose the small term before it subtracts 1.
    rows_RD = torch.tensor([[1.0], [2.0**-9], [-1.0]], dtype=torch.bfloat16, requires_grad=True)
    gates_KT = torch.ones(3, 1, requires_grad=True)
    y_TD = combine_rows(rows_RD, gates_KT, torch.tensor([[0], [1], [2]]), torch.arange(3), holes=False)
    assert (y_TD.dtype, y_TD.item()) == (torch.bfloat16, 2.0**-9)
    y_TD.sum().backward()
    assert (rows_RD.grad.dtype, gates_KT.grad.dtype) == (torch.bfloat16, torch.float32)
    assert gates_KT.grad.flatten().tolist() == [1.0, 2.0**-9, -1.0]


def test_rows_are_cast_and_their_gradients_added_up_in_the_dtype_of_x() -> None:
    x_TD = torch.tensor([[1 + 2.0**-9], [3.0]], requires_grad=True)
    token_R, slots_KT = torch.tensor([0, 1, 0]), torch.tensor([[0, 1], [2, 3]])
    rows_RD = select_rows(x_TD, token_R, slots_KT, inverse_holes=True, dtype=torch.bfloat16)
    assert rows_RD.dtype == torch.bfloat16 and rows_RD.flatten().tolist() == [1, 3, 1]
    rows_RD.backward(torch.tensor([[1.0], [5.0], [2.0**-9]], dtype=torch.bfloat16))
    assert x_TD.grad is not None and x_TD.grad.flatten().tolist() == [1 + 2.0**-9, 5]  # in bf16 it would be 1


def test_rows_by_hand() -> None:
    # Two tokens with two choices each; token 1's second choice was dropped. Rows: t1 first, t0 second, t0 first.
    choice_R, slots_KT = torch.tensor([1, 2, 0]), torch.tensor([[2, 0], [1, 3]])
    x_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows_RD = select_rows(x_TD, choice_R % 2, slots_KT, inverse_holes=True)
    assert rows_RD.tolist() == [[3, 4], [1, 2], [1, 2]]
    # y0 = 0.75 * row 2 + 0.25 * 10 * row 1, y1 = 1 * row 0
    gates_KT = torch.tensor([[0.75, 1.0], [0.25, 0.0]])
    y_TD = combine_rows(rows_RD * torch.tensor([[1.0], [10.0], [1.0]]), gates_KT, slots_KT, choice_R, holes=True)
    assert y_TD.tolist() == [[0.75 + 2.5, 1.5 + 5.0], [3, 4]]


@EXAMPLES
@given(**SIZES, experts=st.integers(1, 5), multiple=st.sampled_from([1, 2, 4]))
def test_a_layout_with_filler_rows_is_plain_indexing(
    seed: int, tokens: int, width: int, choices: int, kept: float, experts: int, multiple: int
) -> None:
    """Each expert's rows are in its block, by choice and token; outputs and gradients are those of plain indexing."""
    torch.manual_seed(seed)
    given_KT = torch.randint(experts, (choices, tokens))
    index_KT = given_KT.where(torch.rand(choices, tokens) < kept, -1)
    layout = lay_out(index_KT, experts, multiple)
    assert layout.counts == [int((index_KT == expert).sum()) for expert in range(experts)]
    assert layout.block_sizes == [-(-count // multiple) * multiple for count in layout.counts]
    assert layout.drops == bool((index_KT < 0).any())
    for expert, block in enumerate(layout.choice_R.split(layout.block_sizes)):
        own_M = (index_KT.flatten() == expert).nonzero().squeeze(1)
        assert block.tolist() == own_M.tolist() + [index_KT.numel()] * (len(block) - len(own_M))

    x_TD = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    gates_KT = torch.rand(choices, tokens, dtype=torch.float64, requires_grad=True)
    scale_E = torch.rand(experts, dtype=torch.float64) + 1  # what an expert does
    scale_R1 = scale_E.repeat_interleave(torch.tensor(layout.block_sizes))[:, None]
    rows_RD = select_rows(x_TD, layout.token_R, layout.slots_KT, inverse_holes=layout.drops) * scale_R1
    actual = combine_rows(rows_RD, gates_KT, layout.slots_KT, layout.choice_R, holes=layout.drops)
    weight_KT = gates_KT * (index_KT >= 0) * scale_E[index_KT]
    expected = (weight_KT[:, :, None] * x_TD).sum(0)
    assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    ours, theirs = (gradients(y_TD, x_TD, gates_KT) for y_TD in (actual, expected))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
