"""The linear probe: equal to CLIP_benchmark's own, ported to the CPU; probes trained together equal single ones."""

import pytest
import torch
from clip_benchmark.metrics import linear_probe
from torch import nn

from tests.bench import clip_benchmark_probe
from upcycle_bench.evaluation.probe import WEIGHT_DECAYS, Examples, Recipe, find_peak, fit, train_all

CLASSES, WIDTH = 7, 12


def examples(seed: int, each: int, noise: float = 1.0) -> Examples:
    """`each` samples of every class around its own direction, of unit length, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    centre_YC = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    label_N = torch.arange(CLASSES).repeat(each)[torch.randperm(CLASSES * each, generator=generator)]
    features_NC = centre_YC[label_N] + noise * torch.randn(len(label_N), WIDTH, generator=generator)
    return Examples(nn.functional.normalize(features_NC, dim=1), label_N)


class Cpu(str):
    """A device that CLIP_benchmark takes for CUDA."""

    def __eq__(self, other):
        return other == "cuda" or str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.fixture
def ported(monkeypatch):
    """CLIP_benchmark's probe on the CPU, without its prints."""
    monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(nn, "DataParallel", lambda module, device_ids: module)
    monkeypatch.setattr("builtins.print", lambda *_: None)
    monkeypatch.setattr(linear_probe, "tqdm", lambda items: items)
    loader = linear_probe.DataLoader
    monkeypatch.setattr(linear_probe, "DataLoader", lambda data, pin_memory, **rest: loader(data, **rest))
    return linear_probe


class Identity(nn.Module):
    def encode_image(self, features):
        return features


@pytest.mark.parametrize("shots", [-1, 6], ids=["full", "few-shot"])
def test_equals_clip_benchmark(ported, tmp_path, shots):
    train, validation, test = examples(0, 6), examples(1, 4), examples(2, 30)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        order = torch.randperm(len(train))  # CLIP_benchmark's order of the training samples
        torch.manual_seed(5)
        theirs = ported.evaluate(
            Identity(), *([(part.features_NC, part.label_N)] for part in (train, test)), shots, 16, 0, 0.1, 10,
            "model", 3, str(tmp_path / "features"), Cpu("cpu"),
            [(validation.features_NC, validation.label_N)], normalize=False, amp=False,
        )  # fmt: skip
    fitted = fit(train.take(order.numpy()), validation, CLASSES, Recipe(batch_size=16, seed=3), refit=shots < 0)
    accuracy = (fitted.logits(test.features_NC).argmax(dim=1) == test.label_N).double().mean().item()
    assert (fitted.weight_decay, accuracy) == (theirs["weight_decay"], pytest.approx(theirs["lp_acc1"], abs=1e-6))
    assert 0.3 < accuracy < 0.95  # neither hopeless nor trivial
    if shots < 0:  # the baseline of `make bench`
        decay, logits_NY = clip_benchmark_probe.linear_probe(
            train.take(order.numpy()), validation, test, CLASSES, workers=0, seed=3, batch_size=16
        )
        found = (logits_NY.argmax(dim=1) == test.label_N).double().mean().item()
        assert (decay, found) == (theirs["weight_decay"], pytest.approx(theirs["lp_acc1"], abs=1e-12))


def test_weights_equal_clip_benchmarks_and_do_not_depend_on_company(ported):
    train = examples(0, 6)
    recipe = Recipe(batch_size=16, seed=3)
    together = train_all(train, CLASSES, WEIGHT_DECAYS, recipe)  # those with the greatest weight decays diverge
    for index in (0, 30, 60, 70):
        loader = torch.utils.data.DataLoader(
            ported.FeatureDataset(train.features_NC, train.label_N), batch_size=16, shuffle=True
        )
        with torch.random.fork_rng():
            theirs = ported.train(loader, WIDTH, CLASSES, WEIGHT_DECAYS[index], 0.1, 10, False, "cpu", 3)
        alone = train_all(train, CLASSES, WEIGHT_DECAYS[index : index + 1], recipe)
        for weight_CY in (theirs.weight.detach().T, alone.weight_WCY[0]):
            torch.testing.assert_close(together.weight_WCY[index], weight_CY, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(together.bias_WY[index], theirs.bias.detach(), atol=2e-4, rtol=1e-4)
    assert (together.weight_WCY[0] - together.weight_WCY[60]).abs().max() > 0.1


def test_the_search_asks_for_whole_rounds_and_climbs():
    asked = []

    def accuracies(indices):
        asked.append(list(indices))
        return [1 - abs(index - 42) / 100 for index in indices]

    assert find_peak(accuracies) == 42
    # 48 is the nearest of the seven, then 40; of 40 and 44, equally near, the first; then 42, which stays.
    assert asked == [[0, 16, 32, 48, 64, 80, 96], [40, 48, 56], [36, 40, 44], [38, 40, 42], [41, 42, 43]]
    assert find_peak(lambda indices: [0.0] * len(indices)) == 0


def test_lbfgs_is_scikit_learns_also_of_two_classes_and_without_one():
    from sklearn.linear_model import LogisticRegression

    train, validation, test = examples(0, 6), examples(1, 4), examples(2, 30)
    for classes in (CLASSES, 2):
        parts = [part.take((part.label_N < classes).nonzero()[:, 0].numpy()) for part in (train, validation, test)]
        fitted = fit(parts[0], parts[1], classes + 1, Recipe(solver="lbfgs"))
        theirs = LogisticRegression(C=1 / fitted.weight_decay, max_iter=1000)
        theirs.fit(parts[0].features_NC.numpy(), parts[0].label_N.numpy())
        ours = fitted.logits(parts[2].features_NC).argmax(dim=1).numpy()
        assert (ours == theirs.predict(parts[2].features_NC.numpy())).all()
        assert (ours == parts[2].label_N.numpy()).mean() > 0.6


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    train_all(examples(0, 2), CLASSES, WEIGHT_DECAYS[:1], Recipe(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
