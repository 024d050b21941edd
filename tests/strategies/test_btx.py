"""Branch-Train-MiX: its invariant, domains, batches, and the literal mix.

Shape suffixes: S samples.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import (
    TinyWorkshop,
    equal,
    features,
    initialise,
    tiny_batches,
    tiny_clip,
    tiny_moe,
    upcycled,
)
from tests.literal import btx as literal
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategies import btx
from upcycle_bench.strategy import Groups
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

BTX = load_registry().strategies["btx"].target


def groups(sizes: list[int], kind: Any = "group") -> Groups:
    """That many samples of each group, shuffled."""
    number_S = torch.cat([torch.full((size,), group) for group, size in enumerate(sizes)])
    order_S = torch.randperm(len(number_S), generator=torch.Generator().manual_seed(0))
    return Groups(kind, number_S[order_S])


# ---- Domains --------------------------------------------------------------------------------------------------------


def test_domains_by_hand() -> None:
    # 9 | 7 | 6; then 5 to the third (11), 4 to the second (11), 3 to the first (12), 1 to the second (12)
    assert literal.gathered([4, 9, 1, 7, 3, 6, 5], 3) == [[1, 4], [3, 0, 2], [5, 6]]


@pytest.mark.parametrize("number", [1, 3, 8])
def test_domains_are_the_literal_ones_and_every_sample_is_in_one(number: int) -> None:
    sizes = torch.randint(1, 40, (12,), generator=torch.Generator().manual_seed(number)).tolist()
    found = groups(sizes)
    parts = btx.domains(found, number)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(sum(sizes)))
    expected = [sorted(members) for members in literal.gathered(sizes, number)]
    assert [found.number_S[part].unique().tolist() for part in parts] == expected
    assert max(map(len, parts)) - min(map(len, parts)) <= max(sizes)


def test_shards_are_gathered_in_runs() -> None:
    found = groups([10] * 7, "shard")
    parts = [found.number_S[part].unique().tolist() for part in btx.domains(found, 3)]
    assert parts == [[0, 1, 2], [3, 4], [5, 6]]


def test_too_few_groups_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^btx: the data have 3 shards for 4 domains; set branches=3"):
        btx.domains(groups([5, 5, 5], "shard"), 4)


def test_batches_are_epochs_of_the_domain() -> None:
    domain_S = torch.arange(100, 111)
    rows_SB = btx.domain_batches(domain_S, 3, 5, Stream(("a",)))
    assert rows_SB.shape == (5, 3)
    assert set(rows_SB.flatten().tolist()) <= set(domain_S.tolist())
    assert len(rows_SB[:3].unique()) == 9  # no sample twice in an epoch
    assert not torch.equal(rows_SB[3:], rows_SB[:2])


# ---- The mix --------------------------------------------------------------------------------------------------------


def test_all_branches_equal_is_sparse_upcycling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The invariant: untrained branches give copies of the dense FFN, and an average that is the dense model's."""
    monkeypatch.setattr(TinyWorkshop, "train", lambda *_, **__: None)
    for branches in (0, 3):
        clip = tiny_clip()
        made = initialise(BTX(branches=branches), clip, seed=0)
        assert equal(made.model.state_dict(), clip.model.state_dict())
        for layer in made.layers:
            dense = clip.model.get_submodule(layer.mlp_path).state_dict()
            assert all(equal(expert.state_dict(), dense) for expert in made.inits[layer.name].experts)
    batch = tiny_batches(clip, seed=5)[0]
    model = upcycled(BTX(), clip, seed=0).model
    assert_close(features(model, *batch), features(clip.model, *batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_the_mix_equals_the_literal_one(branches: int) -> None:
    clip = tiny_clip()
    made = initialise(BTX(branches=branches), clip, seed=0)
    assert len(made.branches) == branches
    names = ["logit_scale", "visual.class_embedding", "ln_final.bias", "visual.transformer.resblocks.0.mlp.c_fc.bias"]
    states = [dict(branch.named_parameters()) for branch in made.branches]
    average = literal.averaged([{name: state[name].flatten().tolist() for name in names} for state in states])
    ours = dict(made.model.named_parameters())
    for name in names:  # the mean is taken in float64 and rounded once
        assert ours[name].flatten().tolist() == torch.tensor(average[name], dtype=torch.float64).float().tolist()
    for name, parameter in ours.items():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-7)
    for layer in made.layers:
        for number, expert in enumerate(made.inits[layer.name].experts):
            source = made.branches[literal.expert_source(number, branches, 4)]
            assert equal(expert.state_dict(), source.get_submodule(layer.mlp_path).state_dict())
    assert [literal.expert_source(number, 4, 8) for number in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


# ---- What the branches are given ------------------------------------------------------------------------------------


class Watching(TinyWorkshop):
    """Keeps what each branch was given."""

    def train(self, model: Any, rows_SB: Tensor, name: str, **options: Any) -> None:
        assert equal(model.state_dict(), self.dense().state_dict())
        super().train(model, rows_SB, name, **options)
        self.given = [*getattr(self, "given", []), (rows_SB, options)]


def test_each_branch_trains_everything_on_its_own_domain() -> None:
    workshop = Watching(tiny_clip(), tiny_moe(), Stream(("test",)))
    preparation = BTX(epochs=2, lr_factor=0.5).prepare(workshop)
    parts = btx.domains(workshop.groups(), 4)
    assert len(workshop.given) == 4
    for place, ((rows_SB, options), part) in enumerate(zip(workshop.given, parts, strict=True), start=1):
        assert set(rows_SB.flatten().tolist()) == set(part.tolist())  # 16 samples, 4 batches of 4, twice
        assert options == {"lr_factor": 0.5}
        assert preparation.notes[f"branch {place} steps"] == len(rows_SB) == 8
        assert preparation.notes[f"branch {place} samples"] == 16
    dense = workshop.dense().state_dict()
    for branch in preparation.branches:
        assert not any(torch.equal(value, dense[name]) for name, value in branch.named_parameters())


def test_branches_that_cannot_be_are_errors() -> None:
    workshop = TinyWorkshop(tiny_clip(), tiny_moe(), Stream(("test",)))
    with pytest.raises(UserError, match=r"branches=5 exceeds the 4 experts"):
        BTX(branches=5).prepare(workshop)
    workshop.batch_size = 20
    with pytest.raises(UserError, match=r"one of 4 domains has 16 samples, fewer than a batch of 20"):
        BTX().prepare(workshop)
