"""CLIP-MoE: its invariants C1 to C5 (headings below), its edges, and what a stage is given.

Shape suffixes: S samples.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import (
    TinyWorkshop,
    dense_forward,
    equal,
    features,
    initialise,
    moe_layer,
    random_ffn,
    tiny_batches,
    tiny_clip,
    tiny_moe,
)
from upcycle_bench.model.ffn import Layer
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategies import clip_moe
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

ClipMoE = load_registry().strategies["clip-moe"].target
CAPS = pytest.mark.parametrize("cap", [1, 2, 3, 7])


def stage_labels(stages: int, samples: int = 400, radix: int = 9, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, radix, (samples,), generator=generator) for _ in range(stages)]


class Watching(TinyWorkshop):
    """Keeps what each stage was given: rows, parameters chosen, the model before."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.trained: list[tuple[Any, Tensor, dict[str, Any]]] = []
        self.encoded: list[tuple[Any, Tensor]] = []

    def train(self, model: Any, rows_SB: Tensor, name: str, **options: Any) -> None:
        assert equal(model.state_dict(), self.dense().state_dict())  # every stage begins at the dense model
        super().train(model, rows_SB, name, **options)
        self.trained.append((model, rows_SB, options))

    def encode(self, model: Any, index_S: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if len(index_S):
            self.encoded.append((model, index_S))
        return super().encode(model, index_S)


def watched(seed: int = 0, **options: Any) -> tuple[Any, Watching]:
    workshop = Watching(tiny_clip(), tiny_moe(), Stream(("test", seed)))
    return ClipMoE(**options).prepare(workshop), workshop


# ---- C1, C2: labels and batches -------------------------------------------------------------------------------------


@CAPS
def test_c1_every_batch_is_from_one_cluster(cap: int) -> None:
    label_S = torch.zeros(400, dtype=torch.long)
    for stage, labels in enumerate(stage_labels(3, radix=4)):
        label_S = clip_moe.accumulate(label_S, labels, 2, cap)
        rows_SB, lost = clip_moe.cluster_batches(label_S, 5, Stream(("batches", stage)))
        assert rows_SB.shape[1] == 5 and len(rows_SB) > 0
        assert (label_S[rows_SB] == label_S[rows_SB[:, :1]]).all()
        assert len(rows_SB.unique()) == rows_SB.numel()  # one epoch: no sample twice
        sizes = label_S.unique(return_counts=True)[1]
        assert len(rows_SB) == int((sizes // 5).sum())
        assert lost == pytest.approx(float(sizes[sizes < 5].sum()) / 400)


def test_c1_holds_for_what_is_trained() -> None:
    preparation, workshop = watched(max_accumulated_stages=1)
    assert len(workshop.trained) == 3
    for stage, (encoder, index_S) in enumerate(list(workshop.encoded), start=1):
        rows_SB = workshop.trained[stage - 1][1]
        rng = workshop.rng.child("stage", stage)
        label_S = torch.empty(64, dtype=torch.long)
        label_S[index_S] = clip_moe.stage_labels(workshop, encoder, index_S, 3, rng)
        assert len(label_S.unique()) > 2
        assert rows_SB.shape[1] == 4
        assert (label_S[rows_SB] == label_S[rows_SB[:, :1]]).all()
        assert preparation.notes[f"stage {stage} steps"] == len(rows_SB)


@pytest.mark.parametrize(
    ("batches", "clusters", "most", "stages"),
    [
        (1500, 3, 3, 3),
        (729, 3, 3, 3),
        (728, 3, 3, 2),
        (130, 3, 3, 2),
        (16, 3, 3, 1),
        (8, 3, 3, 1),
        (10**6, 3, 2, 2),
        (1, 1, 3, 3),
    ],
)
def test_labels_come_together_while_a_mean_cluster_fills_a_batch(
    batches: int, clusters: int, most: int, stages: int
) -> None:
    """1.2 million samples are 1,500 of the paper's batches of 800; smoke's 1,079 are 16 batches of 64."""
    assert clip_moe.depth(batches, clusters, most) == stages


def test_the_receipt_says_how_many_stages_came_together() -> None:
    assert watched()[0].notes["accumulated stages"] == 1  # 16 batches, 9 and 81 clusters
    assert watched(clusters=2)[0].notes["accumulated stages"] == 2  # 4, 16 and 64 clusters


@CAPS
def test_c2_accumulated_labels_refine_those_before(cap: int) -> None:
    """a_s // 9 is a_{s-1}, without its oldest label once `cap` of them have come together."""
    before_S = torch.zeros(400, dtype=torch.long)
    for stage, labels in enumerate(stage_labels(6), start=1):
        label_S = clip_moe.accumulate(before_S, labels, 3, cap)
        assert torch.equal(label_S // 9, before_S if stage <= cap else before_S % 9 ** (cap - 1))
        assert torch.equal(label_S % 9, labels)
        assert int(label_S.max()) < 9 ** min(stage, cap)
        before_S = label_S


def test_clusters_take_turns_and_orders_differ_by_stream() -> None:
    label_S = torch.tensor([5] * 7 + [2] * 4 + [9] * 1 + [7] * 2)
    rows_SB, lost = clip_moe.cluster_batches(label_S, 2, Stream(("a",)))
    assert label_S[rows_SB[:, 0]].tolist() == [2, 5, 7, 2, 5, 5]
    assert lost == pytest.approx(1 / 14)
    assert not torch.equal(rows_SB, clip_moe.cluster_batches(label_S, 2, Stream(("b",)))[0])


def test_a_single_cluster_is_ordinary_fine_tuning() -> None:
    rows_SB, lost = clip_moe.cluster_batches(torch.zeros(10, dtype=torch.long), 3, Stream(("a",)))
    assert (rows_SB.shape, lost) == ((3, 3), 0)
    preparation, workshop = watched(clusters=1)
    assert [len(rows) for _, rows, _ in workshop.trained] == [16, 16, 16]
    assert preparation.notes["stage 3 share in skipped clusters"] == 0


def test_all_clusters_skipped_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = iter([torch.zeros(64, dtype=torch.long), torch.arange(64)])  # in stage 2 every sample has one of its own
    monkeypatch.setattr(clip_moe, "stage_labels", lambda *_: next(labels))
    with pytest.raises(UserError, match=r"stage 2 of 3: all 64 clusters of 64 samples are smaller than a batch of 4"):
        watched(clusters=8)


# ---- C3: what a stage trains ----------------------------------------------------------------------------------------


def test_c3_stages_differ_from_the_dense_model_in_mlp_tensors_only() -> None:
    preparation, workshop = watched()
    dense = workshop.dense().state_dict()
    assert equal(preparation.model.state_dict(), dense)
    assert len(preparation.branches) == 3
    for branch in preparation.branches:
        changed = {name for name, value in branch.state_dict().items() if not torch.equal(value, dense[name])}
        assert changed == {name for name in dense if ".mlp." in name}
        assert {name.startswith("visual") for name in changed} == {True, False}


def test_each_stage_is_sorted_by_the_one_before_and_told_how_to_train() -> None:
    _, workshop = watched(label_smoothing=0.2, lr_factor=0.5)
    models = [model for model, _, _ in workshop.trained]
    encoders = [model for model, _ in workshop.encoded]
    assert equal(encoders[0].state_dict(), workshop.dense().state_dict())
    assert encoders[1:] == models[:-1]
    assert all(torch.equal(index_S, workshop.encoded[0][1]) for _, index_S in workshop.encoded)  # the same samples
    for _, _, options in workshop.trained:
        assert (options["label_smoothing"], options["lr_factor"]) == (0.2, 0.5)


def test_fewer_steps_mean_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        TinyWorkshop, "steps_per_branch", lambda self, *given, **named: asked.update(named, g=given) or 5
    )
    preparation, workshop = watched(budget=0.5)
    assert asked["g"] == (3, 16) and (asked["budget"], asked["encoded_per_step"]) == (0.5, 4)
    assert preparation.notes["samples"] == 20
    assert all(len(index_S) == 20 for _, index_S in workshop.encoded)
    seen = set(workshop.encoded[0][1].tolist())
    assert all(set(rows_SB.flatten().tolist()) <= seen for _, rows_SB, _ in workshop.trained)
    assert all(len(rows_SB) <= 5 for _, rows_SB, _ in workshop.trained)


# ---- C4, C5: the assembly -------------------------------------------------------------------------------------------


def test_c4_expert_0_is_dense_and_routed_to_alone_gives_the_dense_model() -> None:
    clip = tiny_clip()
    made = initialise(ClipMoE(), clip, seed=0)
    for layer in made.layers:
        first, *others = made.inits[layer.name].experts
        dense = clip.model.get_submodule(layer.mlp_path).state_dict()
        assert equal(first.state_dict(), dense)
        for expert, branch in zip(others, made.branches, strict=True):
            theirs = branch.get_submodule(layer.mlp_path).state_dict()
            assert equal(expert.state_dict(), theirs) and not equal(theirs, dense)
    model = put_experts(made.model, made.inits, tiny_moe(top_k=1))
    force_expert_0(model)
    batch = tiny_batches(clip, seed=5)[0]
    assert_close(features(model, *batch), features(clip.model, *batch), rtol=1e-5, atol=1e-5)


def force_expert_0(model: Any) -> None:
    """Replace what the gates say: all tokens to expert 0 with weight 1."""
    from upcycle_bench.model.moe import moe_layers

    def only_0(_module: Any, _args: Any, routes: tuple[Any, ...]) -> tuple[Any, ...]:
        l_aux, capacity, experts, index_KT, location_KT, gates_KT, counts = routes
        return l_aux, capacity, experts, index_KT * 0, location_KT, torch.ones_like(gates_KT), counts

    for layer in moe_layers(model).values():
        layer.gate.register_forward_hook(only_0)


def test_c5_stages_equal_to_the_dense_model_are_sparse_upcycling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyWorkshop, "train", lambda *_, **__: None)
    clip = tiny_clip()
    made = initialise(ClipMoE(), clip, seed=0)
    for layer in made.layers:
        dense = clip.model.get_submodule(layer.mlp_path).state_dict()
        assert all(equal(expert.state_dict(), dense) for expert in made.inits[layer.name].experts)
    ffn = random_ffn(32, 16)
    init = ClipMoE().init_layer(ffn, Layer("vision", 1, 2, 4, 2), [ffn] * 3, Stream(("test",)))
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(moe_layer(init).eval()(x_TD), dense_forward(ffn, x_TD), rtol=1e-10, atol=1e-12)


def test_the_initialisation_seed_drives_the_samples() -> None:
    rows = [watched(seed)[1].trained[0][1] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0][: len(rows[2])], rows[2][: len(rows[0])])
