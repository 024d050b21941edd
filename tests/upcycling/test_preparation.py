"""The workshop on real data, in a session: features, training of chosen parameters, what a budget pays, groups.

Shape suffixes: S samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from tests.helpers import SMOKE, equal, initialise, tiny_moe
from upcycle_bench.data.pairs import PairDataset, PickedBatches
from upcycle_bench.data.world import World
from upcycle_bench.data.worlds import lab, load_world, training_groups
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.strategy import Groups
from upcycle_bench.training.job import Job
from upcycle_bench.training.loop import train
from upcycle_bench.training.step import compute_losses
from upcycle_bench.upcycling import clustering
from upcycle_bench.upcycling.preparation import TrainingWorkshop
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

SETTINGS = ["train.schedule.batch_size=32", "train.schedule.steps=40"]
BIASES = {"trainable": lambda name: name.endswith("mlp.c_fc.bias")}
pytestmark = pytest.mark.usefixtures("session")


def workshop(pairs: PairDataset, seed: int = 0, kind: type[TrainingWorkshop] = TrainingWorkshop) -> TrainingWorkshop:
    protocol = load_protocol(SMOKE, SETTINGS)
    groups = training_groups(load_world("digits", 0))
    return kind(create_clip("smoke-vit", seed=3), pairs, protocol, Stream(("test", seed)), groups, label="test")


def test_features_are_the_models_own_whatever_the_batch(pairs: PairDataset) -> None:
    shop = workshop(pairs)
    model = shop.dense().train()
    index_S = torch.randperm(len(shop))[:300]
    parts = list(shop.encode(model, index_S))
    image_SC, text_SC = (torch.cat(part) for part in zip(*parts, strict=True))
    assert [len(image) for image, _ in parts] == [256, 44]
    assert image_SC.dtype == text_SC.dtype == torch.float32
    assert model.training
    batch = pairs.pick(index_S, shop.rng.child("encoding"))
    with torch.no_grad():
        model.eval()
        expected = model.encode_image(pairs.clip.normalise(batch.images)), model.encode_text(batch.texts)
    for ours, theirs in zip((image_SC, text_SC), expected, strict=True):
        assert torch.allclose(ours, F.normalize(theirs, dim=-1), atol=1e-5)
    assert shop.flops > 0
    assert list(shop.encode(model, index_S[:0])) == []
    assert (shop.samples, shop.steps) == (300, 0)


def test_training_changes_what_was_chosen_and_nothing_else(pairs: PairDataset) -> None:
    """The same seed gives the same; the dense model stays; afterwards all parameters require gradients again."""
    made = []
    for seed in (0, 0):
        shop = workshop(pairs, seed)
        before = shop.dense().state_dict()
        model = shop.dense()
        shop.train(model, torch.arange(96).view(3, 32), "biases", label_smoothing=0.1, **BIASES)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if name.endswith("mlp.c_fc.bias")}
        assert equal(shop.dense().state_dict(), before)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        made.append((model.state_dict(), shop.flops))
        assert (shop.samples, shop.steps) == (96, 3)
    assert equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1] > 0


def test_picked_batches_are_the_rows_cut_by_rank(pairs: PairDataset) -> None:
    rows_SB = torch.randperm(len(pairs))[:24].view(3, 8)
    picked = PickedBatches(pairs, rows_SB)
    assert [batch.index.tolist() for batch in picked.batches("seed", 1, 3, 8)] == rows_SB[1:].tolist()
    halves = [picked.batch("seed", 2, 8, rank, 2) for rank in (0, 1)]
    whole = picked.batch("seed", 2, 8)
    assert torch.equal(torch.cat([half.index for half in halves]), rows_SB[2])
    assert torch.equal(torch.cat([half.images for half in halves]), whole.images)
    assert torch.equal(torch.cat([half.texts for half in halves]), whole.texts)


class Priced(TrainingWorkshop):
    """A training step costs 4,000, a branch's 2,000, the encoding of a sample 30."""

    def charge(self, flops: int) -> int:
        self.flops += flops
        return flops

    def _training_flops(self) -> int:
        return self.charge(4000)

    def _step_flops(self, model: Any, trainable: Callable[[str], bool]) -> int:
        return self.charge(2000)

    def encode(self, model: Any, index_S: Tensor) -> Iterator[Any]:
        yield self.charge(30 * len(index_S))


def test_what_a_budget_pays_by_hand(pairs: PairDataset) -> None:
    def paid(*arguments: Any, **options: Any) -> int:
        return workshop(pairs, kind=Priced).steps_per_branch(*arguments, **options)

    # A branch's step and the encoding of 32 samples cost 2,960; four branches 11,840. Training 40 * 4,000 = 160,000.
    # Probes 4,000 + 2,000 + 960 = 6,960; (80,000 - 6,960) / 11,840 = 6.17, ...
    for budget, steps in ((0.5, 6), (1.0, 12), (2.0, 26)):
        assert paid(4, 10**6, budget=budget, encoded_per_step=32) == steps
    assert paid(4, 3, budget=1.0, encoded_per_step=32) == 3  # the ceiling
    assert paid(7, 10**6, budget=1.0) == 11  # (160,000 - 6,000) / 14,000
    message = r"^test: budget=0.1 .*pays 0.62 steps for each of 8 branches; raise budget to 0.14"
    with pytest.raises(UserError, match=message) as error:  # (16,000 - 6,000) / 16,000; 22,000 / 160,000
        paid(8, 3, budget=0.1)
    assert "\n" not in str(error.value)


def test_budgets_are_shares_of_the_upcycled_models_training(pairs: PairDataset) -> None:
    shop = workshop(pairs)
    before = shop.dense().state_dict()
    expected = shop._training_flops()
    assert 0 < shop.flops < expected
    assert equal(shop.dense().state_dict(), before)
    moe = tiny_moe(experts=8, capacity_factor=8.0)  # nothing is dropped
    clip = replace(pairs.clip, model=shop.dense())
    strategy = load_registry().strategies["sparse-upcycling"].target()
    model = put_experts(clip.model, initialise(strategy, clip, 0, moe=moe).inits, moe)
    schedule = load_protocol(SMOKE, SETTINGS).train.schedule
    job = Job(schedule=schedule, peak_lr=1.0, stop_step=1, seed=0)
    progress = train(replace(clip, model=model), PickedBatches(pairs, shop._probe()[None]), job)
    assert progress.counted_flops == pytest.approx(expected, rel=0.005)


def test_label_smoothing_of_0_is_open_clips_loss_to_the_bit(pairs: PairDataset) -> None:
    clip = create_clip("smoke-vit", seed=3)
    batch = pairs.pick(torch.arange(32), Stream(("a",)))
    image, text, scale = clip.model(clip.normalise(batch.images), batch.texts)[:3]
    schedule = load_protocol(SMOKE).train.schedule
    for smoothing in (0.0, 0.1):
        job = Job(schedule=schedule, peak_lr=1.0, stop_step=1, seed=0, label_smoothing=smoothing)
        losses, _ = compute_losses(lambda *_: (image, text, scale), clip, batch, job, moe_layers(clip.model), None)
        logits = scale * image @ text.T
        logp = [F.log_softmax(each, 1) for each in (logits, logits.T)]
        # The target is 1 - s on the diagonal, and s spread over all.
        terms = [-(1 - smoothing) * each.diagonal().mean() - smoothing * each.mean() for each in logp]
        assert losses["contrastive"].item() == pytest.approx(sum(terms).item() / 2, rel=1e-5)
        plain = ClipLoss(local_loss=True, gather_with_grad=True)(image, text, scale)
        assert (losses["contrastive"].item() == plain.item()) == (smoothing == 0)


# ---- Groups ---------------------------------------------------------------------------------------------------------


def test_digits_groups_are_the_classes_of_the_captions(pairs: PairDataset) -> None:
    world = load_world("digits", 0)
    classes = training_groups(world)
    read = PairDataset(world.train_shards, pairs.clip)
    captions = [read.decode(number)[1] for number in range(len(read))]
    assert len(classes) == len(captions)
    assert all(f"the digit {name}" in lines for name, lines in zip(classes, captions, strict=True))
    found = workshop(pairs).groups()
    assert found.kind == "group"
    assert [sorted(set(classes))[number] for number in found.number_S.tolist()] == classes


def test_local_data_have_shards(pairs: PairDataset) -> None:
    world = load_world("digits", 0)
    assert training_groups(replace(world, name="local")) is None
    shop = TrainingWorkshop(pairs.clip, pairs, load_protocol(SMOKE), Stream(("a",)))
    found = shop.groups()
    assert found.kind == "shard"
    assert isinstance(found, Groups)
    assert found.number_S.bincount().tolist() == [270, 270, 270, 269]
    assert torch.equal(found.number_S, found.number_S.sort().values)


def test_lab_groups_are_the_training_rows_of_the_index(tmp_path: Path) -> None:
    rows = ["split\tgroup\tfamily", "train\tb\tx", "dev-a\ta\tx", "train\ta\ty", "near\tb\tz", "train\tb\tz"]
    (tmp_path / "index.tsv").write_text("\n".join(rows) + "\n")
    assert lab.groups(tmp_path) == ["b", "a", "b"]
    assert training_groups(World("lab", (), tmp_path / "eval", "")) == ["b", "a", "b"]


# ---- k-means --------------------------------------------------------------------------------------------------------


def test_kmeans_finds_blobs_and_leaves_the_global_generator_alone() -> None:
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    blob_T = torch.arange(300) % 3
    points_TD = 5 * torch.eye(3, 8)[blob_T] + 0.1 * torch.randn(300, 8, generator=generator)
    state = np.random.get_state()[1].copy()
    centroid_ED = clustering.minibatch_kmeans(points_TD, 3, Stream(("a",)))
    assert np.array_equal(state, np.random.get_state()[1])
    assert torch.equal(centroid_ED, clustering.minibatch_kmeans(points_TD, 3, Stream(("a",))))
    label_T = clustering.nearest(points_TD, centroid_ED)
    assert len(torch.stack([blob_T, label_T]).unique(dim=1).T) == 3  # blobs and clusters, one to one
    distance_TE = (points_TD[:, None] - centroid_ED).norm(dim=2)
    assert torch.equal(label_T, distance_TE.argmin(1))
    with pytest.raises(UserError, match="2 samples cannot make 3 clusters"):
        clustering.minibatch_kmeans(points_TD[:2], 3, Stream(("a",)))


def test_another_seed_draws_other_captions_for_the_same_samples(pairs: PairDataset) -> None:
    rows_SB = torch.arange(64).view(2, 32)
    made = []
    for seed in (0, 1):
        shop = workshop(pairs, seed)
        model = shop.dense()
        shop.train(model, rows_SB, "all")
        made.append(model.state_dict())
    assert not torch.equal(made[0]["token_embedding.weight"], made[1]["token_embedding.weight"])
