"""The certificate: a sound evaluation gets one; each kind of unsound evaluation ends with an error of its own."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tests.evaluation.contexts import context_of
from tests.evaluation.sets import write_sets
from tests.helpers import equal, tiny_clip
from upcycle_bench import api
from upcycle_bench.cli.evaluate import show_certificate
from upcycle_bench.data import evalset_write
from upcycle_bench.evaluation import certificate, shuffled_labels
from upcycle_bench.evaluation.certificate import MARGIN, differences, routing_margin
from upcycle_bench.evaluation.score import score
from upcycle_bench.evaluation.witness import MOST, Reservoir, Witness
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.record import CertificatePart
from upcycle_bench.suite import EvalContext, Suite, SuiteInfo, SuiteResult
from upcycle_bench.suites.few_shot import FewShot
from upcycle_bench.suites.zero_shot import ZeroShot
from upcycle_bench.util.errors import Unsound
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter

SUITES = {"zero-shot": ZeroShot(sets=("colours", "pairs"), headlines={"in": ("colours",)})}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`colours` and `pairs`; see tests/evaluation/sets.py."""
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


def moe(strategy: str = "sparse-upcycling") -> Clip:
    clip = tiny_clip()
    return replace(clip, model=api.upcycle(clip.model, strategy, experts=4).eval())


def evaluate(root: Path, clip: Clip, suites: Any = None) -> tuple[dict[str, SuiteResult], CertificatePart | None]:
    return score(suites or SUITES, root, clip, Meter(torch.device("cpu")), Reporter(), "")


@pytest.mark.parametrize("experts", [False, True])
def test_a_sound_evaluation_has_its_certificate(root: Path, experts: bool) -> None:
    clip = moe() if experts else tiny_clip()
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    results, proof = evaluate(root, clip)
    assert proof is not None
    assert equal(before, clip.model.state_dict())
    # 400 images, each of 200 twice, and 208 texts. 128 of each kind are sampled; equal images count once.
    assert 128 + 80 < proof.predictions <= 256
    assert [(each.batch_size, each.shuffled, each.differing) for each in proof.repeats] == [
        (7, False, 0),
        (100, True, 0),
    ]
    assert all(0 < each.largest_distance < 1e-5 for each in proof.repeats)
    assert (proof.choices_routed > 0) == experts
    assert {(each.dataset, each.permuted, each.draws, each.samples) for each in proof.controls} == {
        ("colours", "labels", 4, 120),
        ("colours", "classes", 2, 120),
        ("pairs", "labels", 4, 128),
    }
    assert all(each.z < 5 for each in proof.controls if each.z is not None) and proof.uncontrolled is None
    assert proof.reloaded is None  # it has no file
    assert not any(
        layer.gate._forward_hooks or layer.gate._forward_pre_hooks for layer in moe_layers(clip.model).values()
    )
    # The witness changes no score, and a second evaluation gets the same certificate.
    alone = SUITES["zero-shot"].evaluate(context_of(clip, root))
    values = [each.value for each in alone.scores]
    assert [each.value for each in results["zero-shot"].scores] == pytest.approx(values, rel=1e-7)
    _, again = evaluate(root, clip)
    assert again == proof.model_copy(update={"seconds": again.seconds})


class Broken(nn.Module):
    """Replaces the image tower: `change` is applied to its output."""

    def __init__(self, tower: nn.Module, change: Any) -> None:
        super().__init__()
        self.tower, self.change = tower, change

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.change(self.tower(images_B3HW))


def broken(change: Any) -> Clip:
    clip = tiny_clip()
    clip.model.visual = Broken(clip.model.visual, change)
    return clip


def refused(root: Path, clip: Clip, suites: Any = None) -> str:
    with pytest.raises(Unsound) as caught:
        evaluate(root, clip, suites)
    text = str(caught.value)
    assert text.startswith("the evaluation is not sound: ") and "\n" not in text
    return text


def test_predictions_that_depend_on_the_batch_are_refused(root: Path) -> None:
    text = refused(root, broken(lambda pooled_BD: pooled_BD - pooled_BD.mean(dim=0)))  # as a batch norm would
    assert "predictions come out otherwise when the same inputs are encoded again in batches of 7; at most 1" in text


def test_predictions_that_depend_on_the_batch_are_refused_of_few_inputs_too(tmp_path: Path) -> None:
    """The evaluation has one batch of 32 images; the batches of the first repeat are smaller."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(p) for p in rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)]
    evalset_write.write_classification(tmp_path / "few", zip(pictures, [0, 1] * 16, strict=True), ("a", "b"), ("{c}",))
    suites = {"zero-shot": ZeroShot(sets=("few",), headlines={"in": ("few",)})}
    change = broken(lambda pooled_BD: (pooled_BD - pooled_BD.mean(dim=0)) / pooled_BD.std(dim=0))
    assert "in batches of 7; at most 1 in 10,000 may" in refused(tmp_path, change, suites)


def test_an_embedding_that_moves_is_refused_though_it_predicts_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the batch shifts all embeddings alike, too little to change the nearest text."""
    push = broken(lambda pooled_BD: pooled_BD + 2e-3 * len(pooled_BD) / 100)
    monkeypatch.setattr(certificate, "differences", lambda before, again: [])
    assert "come out otherwise" in refused(root, push)
    monkeypatch.setattr(certificate, "MOVED", 1.0)
    assert evaluate(root, push)[1] is not None


def test_predictions_that_depend_on_the_order_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings at odd places of a batch are negated: in order, all even batch sizes give the same."""
    signs = torch.tensor([1.0, -1.0]).repeat(128)[:, None]

    def turned(pooled_BD: Tensor) -> Tensor:
        return pooled_BD * signs[: len(pooled_BD)]

    monkeypatch.setattr(Reservoir, "chosen", _in_order)
    monkeypatch.setattr(certificate, "REPEATS", ((8, False), (100, True)))
    assert "encoded again in batches of 100, in another order,; at most" in refused(root, broken(turned))


def _in_order(sample: Reservoir) -> tuple[list[Tensor], Tensor]:
    """The first rows of the reservoir in their order, so that even places in a batch stay even."""
    return sample.rows[:128], torch.stack(sample.embeddings[:128])


def test_dropped_tokens_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = moe()
    for layer in moe_layers(clip.model).values():
        layer.gate.own_factor = 0.5
        monkeypatch.setattr(layer.gate, "train", lambda mode, gate=layer.gate: gate)  # so that eval() does not reach it
        layer.gate.training = True
    text = refused(root, clip)
    assert "choices of tokens were dropped in vision.1; in evaluation capacity has no limit." in text


class Training(ZeroShot):
    """A suite that trains the model that it scores."""

    def evaluate(self, context: EvalContext) -> SuiteResult:
        with torch.no_grad():
            context.model.logit_scale.add_(1e-3)  # type: ignore[operator]
        return super().evaluate(context)


def test_changed_weights_are_refused(root: Path) -> None:
    text = refused(root, tiny_clip(), {"training": Training(sets=("colours",), headlines={"in": ("colours",)})})
    assert "it changed 1 tensors of the model, logit_scale first; a suite must not train it." in text


def test_features_of_another_model_in_the_cache_are_refused(root: Path, tmp_path: Path) -> None:
    from upcycle_bench.util.cache import cache_root

    task = {"pool": ("colours:train",), "test": ("colours",), "shots": (1,), "validation": 2}
    suites = {"few-shot": FewShot(tasks={"colours": task}, draws=1)}
    clip, meter = tiny_clip(), Meter(torch.device("cpu"))
    others = set((cache_root() / "features").glob("*"))
    first, proof = score(suites, root, clip, meter, Reporter(), "a hash")
    again, cached = score(suites, root, clip, meter, Reporter(), "a hash")
    assert proof is not None and cached is not None
    assert [each.value for each in first["few-shot"].scores] == [each.value for each in again["few-shot"].scores]
    assert cached.uncontrolled is not None and cached.controls == ()
    for path in set((cache_root() / "features").iterdir()) - others:
        with np.load(path) as arrays:
            changed = {"features": np.roll(arrays["features"], 1, axis=1), "labels": arrays["labels"]}
        np.savez(path, **changed)
    with pytest.raises(Unsound, match=r"\.npz holds embeddings that its model does not give; delete it\.$"):
        score(suites, root, clip, meter, Reporter(), "a hash")


@pytest.mark.parametrize("part", ["classes", "texts"])
def test_texts_of_another_model_in_the_cache_are_refused(root: Path, part: str) -> None:
    from upcycle_bench.util.cache import cache_root

    clip, meter, digest = tiny_clip(), Meter(torch.device("cpu")), f"{part} of"
    others, changed = set((cache_root() / "features").glob("*")), {}
    score(SUITES, root, clip, meter, Reporter(), digest)
    score(SUITES, root, clip, meter, Reporter(), digest)  # cached, and right
    for path in set((cache_root() / "features").iterdir()) - others:
        with np.load(path) as arrays:
            if part in arrays:
                changed = {part: np.roll(arrays[part], 1, axis=1)}
        if changed:
            np.savez(path, **changed)
            changed = {}
    with pytest.raises(Unsound, match="holds embeddings that its model does not give"):
        score(SUITES, root, clip, meter, Reporter(), digest)


def test_a_suite_that_encodes_unseen_gets_no_certificate(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unseen(self: ZeroShot, context: EvalContext) -> SuiteResult:
        return SuiteResult([], {}, skipped={"": "nothing to do"})

    monkeypatch.setattr(ZeroShot, "evaluate", unseen)
    assert evaluate(root, tiny_clip())[1] is None
    with Witness(tiny_clip().model) as witness:
        witness.on_encoded(
            nn.Identity(), None, torch.zeros(2, 3, 8, 8), torch.zeros(2, 4)
        )  # a copy that a suite trains
    assert witness.samples["images"].seen == 0


def test_routing_margins_against_the_gates_own_probabilities() -> None:
    clip = moe()
    image = torch.randn(3, *clip.model.visual.image_size, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    layers = moe_layers(clip.model)
    for layer in layers.values():
        layer.gate.register_forward_hook(partial(_probabilities, seen, layer))
    margin = routing_margin(clip.model, clip.model.encode_image, image, context_of(clip))
    assert len(seen) == 2  # vision.1 and vision.3
    slow = min(float(sorted(row)[-2] - sorted(row)[-3]) for probs_TE in seen for row in probs_TE.tolist())
    assert margin == pytest.approx(slow, abs=1e-7) and margin > 0
    dense = tiny_clip()
    assert routing_margin(dense.model, dense.model.encode_image, image, context_of(dense)) == math.inf


def _probabilities(seen: list[Tensor], layer: Any, _gate: nn.Module, args: Any, _output: Any) -> None:
    seen.append(torch.softmax(args[0] @ layer.router_weight.T, dim=1).detach())


@pytest.mark.parametrize(("scale", "sound"), [(1e-6, True), (1.0, False)])
def test_one_difference_may_be_traced_to_a_routing_margin(root: Path, scale: float, sound: bool) -> None:
    """One image has another embedding in small batches. That is sound only where all experts are nearly equal."""
    clip = moe()
    for layer in moe_layers(clip.model).values():
        layer.router_weight.data.mul_(scale)
    odd: list[Tensor] = []

    def change(pooled_BD: Tensor) -> Tensor:
        if len(pooled_BD) == 200:  # the only batch of the evaluation
            odd[:] = [pooled_BD[5].clone()]
            return pooled_BD
        same_B = torch.isclose(pooled_BD, odd[0], atol=1e-6).all(dim=1)
        return torch.where(same_B[:, None], -pooled_BD, pooled_BD)

    clip.model.visual = Broken(clip.model.visual, change)
    suites = {"zero-shot": ZeroShot(sets=("colours",), headlines={"in": ("colours",)})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reservoir, "chosen", _in_order)
        patch.setattr(shuffled_labels, "score_shuffled", lambda *_: ([], "left out"))
        if sound:
            _, proof = evaluate(root, clip, suites)
            assert proof is not None
            for repeat in proof.repeats:
                assert repeat.differing == 1 == len(repeat.margins)
                assert 0 <= repeat.margins[0] < MARGIN and repeat.largest_distance > 1
        else:
            text = refused(root, clip, suites)
            assert "no routing margin below 1e-05 explains it (the least routing margin is" in text


def test_differences_against_a_slow_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    before = [nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (30, 20)]
    again = [part + 0.05 * torch.randn(part.shape, generator=generator) for part in before]

    def nearest(query_C: Tensor, gallery_GC: Tensor, but: int = -1) -> int:
        cosines = [float(query_C @ other_C) if g != but else -2.0 for g, other_C in enumerate(gallery_GC)]
        return max(range(len(cosines)), key=cosines.__getitem__)

    expected = []
    for query, gallery in ((0, 1), (1, 0)):
        for q in range(len(before[query])):
            old, new = (nearest(parts[query][q], before[gallery]) for parts in (before, again))
            if old != new:
                expected.append(30 * query + q)
    assert len(expected) > 2
    assert list(differences(before, again)) == expected
    alone = [q for q in range(30) if nearest(before[0][q], before[0], q) != nearest(again[0][q], before[0], q)]
    assert list(differences(before[:1], again[:1])) == alone != []


@pytest.mark.parametrize(("shift", "found"), [(6e-6, []), (1e-5, [0])])
def test_answers_as_near_as_rounding_are_the_same(shift: float, found: list[int]) -> None:
    """cos((1, -s), (0.8, +-0.6)) = 0.8 -+ 0.6 s: the answers are 1.2 s apart, and MARGIN is 1e-5."""
    answers_GC = torch.tensor([[0.8, 0.6], [0.8, -0.6]], dtype=torch.float64)
    before, again = torch.tensor([[[1, 1e-9]], [[1, -shift]]], dtype=torch.float64)
    assert list(differences([before, answers_GC], [again, answers_GC])) == found


def test_the_reservoir_is_a_fair_sample() -> None:
    """Rows 0 .. 4999 in uneven batches: `MOST` are kept, from everywhere alike, each with its own embedding."""
    sample = Reservoir(torch.Generator().manual_seed(0))
    numbers = torch.arange(5000)
    for batch in numbers.split([1, 299, 700, 4000]):
        sample.add(None, batch[:, None], batch[:, None].float())
    rows, embeddings_NC = sample.chosen()
    assert len(sample.rows) == MOST == 512 and len(rows) == 500  # a tenth
    kept = torch.cat(sample.rows)
    assert len(kept.unique()) == 512 and torch.equal(torch.cat(rows).float(), embeddings_NC[:, 0])
    assert torch.histc(kept.float(), 5, 0, 5000).tolist() == pytest.approx([102.4] * 5, abs=36)  # 4 sigma


@dataclass(frozen=True, kw_only=True)
class Named(ZeroShot):
    """A suite that scores only what a protocol names, on copies that it trains."""

    info: ClassVar[SuiteInfo] = SuiteInfo(name="named", summary="", paper="", version=1, tunes=True)

    @classmethod
    def of_set(cls, folder: Path) -> Suite:  # type: ignore[override]
        return super(ZeroShot, cls).of_set(folder)


def test_what_a_certificate_leaves_out_is_said_on_the_terminal(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = SUITES | {"named": Named(sets=("colours",), headlines={"in": ("colours",)})}
    _, proof = evaluate(root, tiny_clip(), suites)
    assert proof is not None and proof.uncovered == "named"
    assert proof.uncontrolled == "named: it scores only what a protocol names, and no protocol names shuffled labels."
    monkeypatch.setenv("COLUMNS", "72")
    show_certificate(proof.model_dump(mode="json"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 72
    assert lines[0].startswith("certificate: ") and all(line.startswith("  ") for line in lines[1:])
    said = " ".join(" ".join(lines).split())
    assert "not covered: the fine-tuned copies that named scores;" in said
    assert "not controlled: named: it scores only what a protocol names, and no protocol" in said
    assert "--protocol" not in said
    # The two largest of four classes: chance is 1/2 there and 1/4 in the table.
    assert re.search(r"labels of colours shuffled 4 times: \S+ -?0\.\d+, chance -?0\.\d+ on 120 samples", said)
    assert re.search(r"class names of colours shuffled 2 times: acc1 0\.\d+, chance 0\.5000 on 120 samples", said)
    assert "their chance is not the tables'" in said
