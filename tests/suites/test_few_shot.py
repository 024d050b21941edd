"""The probing suites: every model sees the same shots, and no test sample; missing data are skipped or an error."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data import evalset_write
from upcycle_bench.data.worlds import fashion
from upcycle_bench.evaluation import embedding_cache
from upcycle_bench.evaluation.features import image_features
from upcycle_bench.evaluation.probe import Recipe, fit
from upcycle_bench.evaluation.probe_scores import Classified, add_scores
from upcycle_bench.evaluation.shots import Sizes, choose
from upcycle_bench.suite import EvalContext, SuiteResult
from upcycle_bench.suites.few_shot import FewShot
from upcycle_bench.suites.linear_probe import LinearProbe
from upcycle_bench.util.environment import installed_version
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

NAMES = ("red", "green", "blue")


class Colours(torch.nn.Module):
    """A model whose embedding is the mean colour; it counts its images."""

    seen = 0

    def encode_image(self, images_B3HW):
        self.seen += len(images_B3HW)
        return images_B3HW.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sets of 30 coloured squares, the second darker; its first class has two samples fewer."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name, light, labels in (("light", 200, [0, 1, 2] * 10), ("dark", 90, [1, 2] * 11 + [0] * 8)):
        pictures = []
        for label in labels:
            pixels = rng.integers(0, 60, (4, 4, 3), dtype=np.uint8)
            pixels[..., label] += np.uint8(light // 2)
            pictures.append(Image.fromarray(pixels))
        evalset_write.write_classification(root / name, zip(pictures, labels, strict=True), NAMES, ("{c}",))
    return root


def context(root, weights="") -> EvalContext:
    def transform(image):
        return torch.from_numpy(np.asarray(image).astype(np.float32).transpose(2, 0, 1))

    return EvalContext(
        model=Colours(), tokenizer=None, transform=transform, root=root, device=torch.device("cpu"), weights=weights
    )  # type: ignore[arg-type]


def suite(draws=3, **task) -> FewShot:
    settings = {"pool": ("light",), "test": ("dark",), "shots": (1, 3), "validation": 3} | task
    return FewShot(tasks={"colours": settings}, draws=draws)


def test_shots_are_nested_disjoint_and_the_same_for_everyone():
    label_N = np.array([0, 1] * 10)
    chosen = {
        (shots, draw): choose("d", label_N, "ab", shots=shots, draw=draw, sizes=Sizes(3, 2, test=True))
        for shots in (1, 3)
        for draw in (0, 1)
    }
    for (shots, draw), manifest in chosen.items():
        parts = [manifest.train_S, manifest.validation_V, manifest.test_U]
        assert [len(part) for part in parts] == [2 * shots, 4, 10]
        assert len(np.unique(np.concatenate(parts))) == 2 * shots + 14
        assert np.bincount(label_N[manifest.train_S]).tolist() == [shots, shots]
        assert set(chosen[1, draw].train_S) <= set(manifest.train_S)
        assert (manifest.test_U == chosen[1, draw].test_U).all()
    assert len({manifest.sha256 for manifest in chosen.values()}) == 4
    # torch's global state does not change them; the hash is that of version 1 of the suite.
    torch.manual_seed(1)
    again = choose("d", label_N, "ab", shots=1, draw=0, sizes=Sizes(3, 2, test=True))
    assert again.sha256 == chosen[1, 0].sha256
    assert again.sha256.startswith("3029971d0dead04c")


def test_too_few_samples_name_the_class(root):
    with pytest.raises(UserError, match=r"colours: class 'red' has 8 samples, but 6 shots, 3 for validation") as caught:
        suite(pool=("dark",), test=("light",), shots=(6,)).evaluate(context(root))
    assert "\n" not in str(caught.value)
    kept = suite(pool=("dark",), test=("light",), shots=(6,), at_least=9).evaluate(context(root))
    assert kept.notes["colours"] == {"classes": 2, "classes_left_out": 1}
    assert kept.notes["colours/6-shot"]["test_samples"] == 20  # without the images of that class


def test_scores_are_means_over_draws_with_their_interval(root):
    result = suite().evaluate(context(root))
    score = next(s for s in result.scores if (s.dataset, s.metric) == ("colours/1-shot", "acc1"))
    correct_RN = result.outcomes["colours/1-shot/correct@1"].reshape(3, 30)
    means = correct_RN.mean(axis=1)
    assert score.value == pytest.approx(means.mean()) and score.value > 0.5
    assert score.standard_error == pytest.approx(means.std(ddof=1) / 3**0.5)
    assert (score.samples, score.chance, score.headline) == (90, 1 / 3, "few-shot")
    assert {s.metric for s in result.scores} == {"acc1", "mean_per_class_recall"}  # three classes have no acc5


class Noise(torch.nn.Module):
    """A model whose embedding says nothing of the class, so that a probe's answers depend on its first weights."""

    def encode_image(self, images_B3HW):
        return images_B3HW[:, 0, 0] % 5 - 2


def test_each_draw_trains_a_probe_with_a_seed_of_its_own(root):
    blind = replace(context(root), model=Noise())
    found = suite(draws=2, shots=(1,)).evaluate(blind).outcomes["colours/1-shot/correct@1"]
    pool, test = (image_features(root / name, "test", blind) for name in ("light", "dark"))

    def answers(draw, seed):
        manifest = choose("colours", pool.label_N.numpy(), NAMES, shots=1, draw=draw, sizes=Sizes(1, 3))
        train, validation = pool.take(manifest.train_S), pool.take(manifest.validation_V)
        logits_NY = fit(train, validation, len(NAMES), Recipe(seed=seed)).logits(test.features_NC)
        return (logits_NY.argmax(1) == test.label_N).tolist()

    second = answers(1, seed=1)
    assert found.tolist() == answers(0, seed=0) + second
    assert second != answers(1, seed=0)


def test_intervals_over_draws_stay_within_0_and_1_and_are_not_empty():
    def of(*shares):
        """acc1 over draws with these numbers of right answers out of ten."""
        rows = [Classified(np.zeros(10, int), np.arange(10) < right, np.ones(10, bool)) for right in shares]
        add_scores("t", rows, 2, "few-shot", result := SuiteResult([], {}))
        return next(score for score in result.scores if score.metric == "acc1")

    # 0.4, 0.5, 0.6: sd 0.1, error 0.1 / sqrt(3); t of two degrees of freedom is 4.3027
    assert of(4, 5, 6).interval == pytest.approx((0.5 - 0.43027 / 3**0.5, 0.5 + 0.43027 / 3**0.5), rel=1e-4)
    # 0.8, 1.0: sd 0.1 sqrt(2), error 0.1; t of one degree of freedom is 12.7: beyond both ends
    assert (of(8, 10).interval, of(8, 10).standard_error) == ((0.0, 1.0), pytest.approx(0.1))
    low, high = of(9, 10, 10).interval
    assert 0.8 < low < of(9, 10, 10).value < high == 1.0
    assert (of(7, 7, 7).value, of(7, 7, 7).standard_error, of(7, 7, 7).interval) == (pytest.approx(0.7), 0.0, None)


def test_lbfgs_sees_the_same_shots(root):
    task = {"pool": ("light",), "test": ("dark",), "shots": (3,), "validation": 3}
    adamw, lbfgs = (
        FewShot(tasks={"c": task}, draws=2, solver=name).evaluate(context(root)) for name in ("adamw", "lbfgs")
    )
    assert lbfgs.notes["c/3-shot"]["manifests"] == adamw.notes["c/3-shot"]["manifests"]
    assert min(result.scores[0].value for result in (adamw, lbfgs)) > 0.6 > 1 / 3


def test_which_set_and_which_category(root, tmp_path):
    result = suite(pool=("light", "dark"), test=(), label="set", shots=(8,), draws=2).evaluate(context(root))
    assert result.notes["colours"]["classes"] == 2
    assert result.notes["colours/8-shot"]["test_samples"] == 60 - 2 * 11
    with pytest.raises(UserError, match=r"index\.tsv is missing; only the lab"):
        suite(label="category", test=()).evaluate(context(root))
    (root.parent / "index.tsv").write_text(
        "split\tgroup\tfamily\tname\tdrawing\tcaption\tcategory\tclass\n"
        + "".join(f"light\tg\tf\tn\td\tc\t{('warm', 'cold', '')[i % 3]}\tx\n" for i in range(30))
        + "light\tg\tf\tn\td\tc\twarm\t\ndark\tg\tf\tn\td\tc\twarm\tx\n"
    )
    try:
        result = suite(label="category", test=()).evaluate(context(root))
    finally:
        (root.parent / "index.tsv").unlink()
    assert result.notes["colours"] == {"classes": 2, "classes_left_out": 0}
    assert result.notes["colours/1-shot"]["test_samples"] == 20 - 2 * 6


def test_features_are_cached_by_weights(root):
    first = context(root, weights="a" * 64)
    once = suite().evaluate(first)
    again = replace(first, model=Colours())
    twice = suite().evaluate(again)
    other = replace(first, model=Colours(), weights="b" * 64)
    suite().evaluate(other)
    assert (first.model.seen, again.model.seen, other.model.seen) == (60, 0, 60)
    assert [s.value for s in twice.scores] == [s.value for s in once.scores]


def test_what_makes_the_pixels_or_the_tower_misses_the_cache(root, monkeypatch):
    first = context(root, weights="c" * 64)
    known = suite().evaluate(first)

    def seen(**changes) -> int:
        again = replace(first, model=Colours(), **changes)
        values = [s.value for s in suite().evaluate(again).scores]
        assert changes or values == [s.value for s in known.scores]
        return again.model.seen

    assert (first.model.seen, seen()) == (60, 0)
    assert seen(transform=lambda image: first.transform(image.resize((2, 2)))) == 60
    assert seen(transform=lambda image: first.transform(image)[[2, 0, 1]]) == 60
    assert seen(transform=lambda image: first.transform(image)) == 0  # another function that makes the same pixels
    for package in ("open_clip_torch", "torchvision", "pillow"):
        with monkeypatch.context() as patch:
            patch.setattr(
                embedding_cache,
                "installed_version",
                lambda name, changed=package: "9.9" if name == changed else installed_version(name),
            )
            assert seen() == 60, package
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    assert seen() == 60


def test_a_task_without_its_data_is_skipped_with_the_reason(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "FOLDER", tmp_path / "nowhere")
    colours = {"pool": ("light",), "test": ("dark",), "shots": (1,), "validation": 1}
    clothes = {"world": "fashion-mnist", "pool": ("fashion-mnist:train",), "shots": (1,), "validation": 1}
    result = FewShot(tasks={"colours": colours, "clothes": clothes}, draws=1).evaluate(context(root))
    assert "install Debian's package" in result.skipped["clothes"]
    assert {score.dataset for score in result.scores} == {"colours/1-shot"}
    with pytest.raises(UserError, match="Debian"):
        FewShot(tasks={"clothes": clothes}).sources(root)


def test_fashion_mnist_is_read_from_the_packages_files(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion, "FOLDER", tmp_path)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((28, 28), np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    world = fashion.load(0, Reporter())
    evalset = evalsets.read(world.eval_root / "fashion-mnist", np.asarray, 100, "train")
    ((images, labels),) = evalset.batches
    assert list(labels) == [i % 10 for i in range(20)]
    assert [int(image.max()) for image in images] == list(range(20))
    assert json.loads((world.eval_root.parent / "manifest.json").read_text())["counts"] == {"train": 20, "test": 10}


@pytest.mark.parametrize("solver", ["adamw", "lbfgs"])
def test_the_linear_probe_learns_from_the_whole_pool(root, solver):
    tasks = {"colours": {"pool": ("light",), "test": ("dark",)}}
    results = [LinearProbe(tasks=tasks, solver=solver).evaluate(context(root)) for _ in range(2)]
    acc1, recall = results[0].scores
    assert (acc1.dataset, acc1.metric, acc1.samples, acc1.headline) == ("colours", "acc1", 30, "linear-probe")
    assert acc1.value == results[0].outcomes["colours/correct@1"].mean() > 0.8
    assert acc1.standard_error == pytest.approx((acc1.value * (1 - acc1.value) / 30) ** 0.5)
    assert (recall.metric, recall.headline) == ("mean_per_class_recall", "")
    assert recall.interval[0] < recall.value <= recall.interval[1] <= 1 and recall.interval[0] > 0.7
    assert results[0].notes["colours"]["training_samples"] == 30
    assert [s.value for s in results[1].scores] == [acc1.value, recall.value]
    with pytest.raises(ValueError, match="needs a test set of its own: colours"):
        LinearProbe(tasks={"colours": {"pool": ("light",)}})
