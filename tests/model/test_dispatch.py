"""Rows sorted by expert and combined again, against plain indexing: layouts, outputs and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from upcycle_bench.model.dispatch import combine_rows, gather_rows, lay_out
from upcycle_bench.model.padding import Padding

SIZES = {
    "seed": st.integers(0, 2**31),
    "tokens": st.integers(1, 12),
    "width": st.integers(1, 5),
    "choices": st.integers(1, 4),
    "kept": st.sampled_from([0.0, 0.3, 0.8, 1.0]),
}
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Those of a weighted sum of the output, with the same random weights at each call."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("index_KT", [[[-1, -1], [-1, -1]], [[0, 1], [-1, 2]], [[0, 1], [2, 0]]])
@pytest.mark.parametrize("multiple", [1, 4])
def test_gradcheck(index_KT: list[list[int]], multiple: int) -> None:
    torch.manual_seed(0)
    layout = lay_out(torch.tensor(index_KT), 3, multiple)
    x_TD = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    rows_RD = torch.randn(len(layout.choice_R), 3, dtype=torch.float64, requires_grad=True)
    gates_KT = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, layout), (x_TD,))
    assert torch.autograd.gradcheck(lambda rows, gates: combine_rows(rows, gates, layout), (rows_RD, gates_KT))


def test_combine_rows_accumulates_bfloat16_in_the_gates_precision() -> None:
    # 1 + 2^-9 needs more than bfloat16's 8 bits: a sum in bfloat16 would lose the small term before it subtracts 1.
    rows_RD = torch.tensor([[1.0], [2.0**-9], [-1.0]], dtype=torch.bfloat16, requires_grad=True)
    gates_KT = torch.ones(3, 1, requires_grad=True)
    y_TD = combine_rows(rows_RD, gates_KT, lay_out(torch.tensor([[0], [1], [2]]), 3))
    assert (y_TD.dtype, y_TD.item()) == (torch.bfloat16, 2.0**-9)
    y_TD.sum().backward()
    assert (rows_RD.grad.dtype, gates_KT.grad.dtype) == (torch.bfloat16, torch.float32)
    assert gates_KT.grad.flatten().tolist() == [1.0, 2.0**-9, -1.0]


def test_rows_by_hand() -> None:
    # Two tokens with two choices each: t0 wants experts 1 and 0, t1 wants 0 and was dropped from the other.
    layout = lay_out(torch.tensor([[1, 0], [0, -1]]), 2)
    rows_RD = gather_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), layout)
    assert rows_RD.tolist() == [[3, 4], [1, 2], [1, 2]]  # expert 0: t1's first choice, t0's second; expert 1: t0
    # y0 = 0.75 * row 2 + 0.25 * 10 * row 1, y1 = 1 * row 0
    gates_KT = torch.tensor([[0.75, 1.0], [0.25, 0.0]])
    y_TD = combine_rows(rows_RD * torch.tensor([[1.0], [10.0], [1.0]]), gates_KT, layout)
    assert y_TD.tolist() == [[0.75 + 2.5, 1.5 + 5.0], [3, 4]]


def test_padding_is_cut_out_and_comes_back_as_zeros() -> None:
    padding = Padding()
    padding.observe(torch.nn.Identity(), (torch.tensor([[1, 9, 0, 0], [1, 2, 9, 0]]),))  # 9: end of text
    x_PD = torch.arange(16.0).view(8, 2).requires_grad_()
    tokens_TD = padding.compact(x_PD)
    assert tokens_TD.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11], [12, 13]]
    back_PD = padding.expand(tokens_TD)
    kept_P1 = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 0])[:, None]
    assert torch.equal(back_PD, x_PD * kept_P1)
    assert torch.equal(gradients(back_PD, x_PD)[0], gradients(x_PD * kept_P1, x_PD)[0])


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
    actual = combine_rows(gather_rows(x_TD, layout) * scale_R1, gates_KT, layout)
    weight_KT = gates_KT * (index_KT >= 0) * scale_E[index_KT]
    expected = (weight_KT[:, :, None] * x_TD).sum(0)
    assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    ours, theirs = (gradients(y_TD, x_TD, gates_KT) for y_TD in (actual, expected))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
