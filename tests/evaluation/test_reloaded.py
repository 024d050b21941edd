"""The certificate loads the saved file: what was scored must be what a user loads."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.evaluation.sets import write_sets
from tests.helpers import tiny_clip
from upcycle_bench import api
from upcycle_bench.evaluation.certificate import require_own_code
from upcycle_bench.evaluation.features import embed
from upcycle_bench.evaluation.score import score
from upcycle_bench.model import weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.gate import Gate
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.protocol import PUBLISHED_MOE
from upcycle_bench.record import CertificatePart
from upcycle_bench.suite import EvalContext, SuiteResult
from upcycle_bench.suites.few_shot import FewShot
from upcycle_bench.suites.zero_shot import ZeroShot
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import Unsound
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter

SUITES = {"zero-shot": ZeroShot(sets=("colours", "pairs"), headlines={"in": ("colours",)})}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


def saved(folder: Path, experts: bool = True) -> tuple[Clip, Path]:
    """A model, whose experts differ, and its file."""
    clip = tiny_clip()
    if experts:
        clip = replace(clip, model=api.upcycle(clip.model, "noise-upcycling", experts=4).eval())
    digest = weights.save(clip, PUBLISHED_MOE.model_copy(update={"experts": 4}), folder)
    return clip, folder / f"{digest}.safetensors"


def certified(root: Path, clip: Clip, file: Path, suites: Any = None, digest: str = "") -> CertificatePart:
    meter = Meter(torch.device("cpu"))
    _, proof = score(suites or SUITES, root, clip, meter, Reporter(), digest, file)
    assert proof is not None
    return proof


@pytest.mark.parametrize("experts", [True, False])
def test_the_saved_file_of_an_honest_model_gives_the_same(root: Path, tmp_path: Path, experts: bool) -> None:
    clip, file = saved(tmp_path, experts)
    proof = certified(root, clip, file)
    assert proof.reloaded is not None
    assert (proof.reloaded.differing, proof.reloaded.margins) == (0, ())
    assert proof.reloaded.largest_distance < 1e-5


def patched_gate(clip: Clip) -> None:
    """The gate of a layer routes as if its tokens were negated."""
    gate = moe_layers(clip.model)["vision.3"].gate
    gate.forward = lambda x_TD, *_: Gate.forward(gate, -x_TD)  # type: ignore[method-assign]


def hook(clip: Clip) -> None:
    """An expert's output is scaled on its way."""
    moe_layers(clip.model)["vision.1"].experts[0].register_forward_hook(lambda module, args, output: 3 * output)


def gate_of_its_own(clip: Clip) -> None:
    """Every token goes to the two least probable experts."""

    class Opposite(Gate):
        def forward(self, x_TD: Tensor, *rest: Any) -> Any:
            return super().forward(-x_TD)

    layer = moe_layers(clip.model)["text.1"]
    own = Opposite(layer.gate.wg.weight.shape[1], layer.settings)
    own.load_state_dict(layer.gate.state_dict())
    layer.moe.deepspeed_moe.gate = own.eval()


def other_encoder(clip: Clip) -> None:
    """Images are encoded by another model."""
    clip.model.encode_image = tiny_other().encode_image


def tiny_other() -> Any:
    model = tiny_clip().model
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("patch", [patched_gate, hook, gate_of_its_own, other_encoder])
def test_a_live_model_that_computes_something_else_is_refused(
    root: Path, tmp_path: Path, patch: Callable[[Clip], None]
) -> None:
    clip, file = saved(tmp_path)
    patch(clip)
    with pytest.raises(Unsound) as caught:
        certified(root, clip, file)
    assert re.fullmatch(
        r"the evaluation is not sound: [\d,]+ of [\d,]+ predictions come out otherwise from the saved file, "
        rf"{file.name[:16]}; at most 1 in 10,000 may. What was scored is not what the file holds: its answers come "
        r"from a hook, a patch or a cache\.",
        str(caught.value),
    )


def test_another_models_file_is_refused(root: Path, tmp_path: Path) -> None:
    _, file = saved(tmp_path)
    with pytest.raises(Unsound, match="What was scored is not what the file holds"):
        certified(root, replace(tiny_clip(), model=tiny_other().eval()), file)


def test_a_patched_class_is_refused_though_the_file_computes_the_same_here(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process the loaded model has the patch too; a user's has not."""
    clip, file = saved(tmp_path)
    honest = Gate.forward
    monkeypatch.setattr(Gate, "forward", lambda self, x_TD, *rest: honest(self, -x_TD))
    with pytest.raises(Unsound, match=r"test_reloaded replaced Gate\.forward; who loads the file has another one\.$"):
        certified(root, clip, file)


class Doubled(ZeroShot):
    """A suite that encodes each picture by a function of its own, twice as bright."""

    def evaluate(self, context: EvalContext) -> SuiteResult:
        result = super().evaluate(context)
        model: Any = context.model
        embed(lambda images: model.encode_image(2 * images), torch.ones(3, 3, *model.visual.image_size), context)
        return result


def test_a_suite_with_an_encoder_of_its_own_is_compared_in_the_usual_way(root: Path, tmp_path: Path) -> None:
    clip, file = saved(tmp_path)
    suites = {"doubled": Doubled(sets=("pairs",), headlines={"in": ("pairs",)}, headline_metric="recall@1")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("upcycle_bench.evaluation.certificate.REPEATS", ())  # they compare with the suite's function
        patch.setattr("upcycle_bench.evaluation.certificate.CertificatePart", partial(CertificatePart.model_construct))
        assert certified(root, clip, file, suites).reloaded is not None
        patched_gate(clip)
        with pytest.raises(Unsound, match="What was scored is not what the file holds"):
            certified(root, clip, file, suites)


def test_cached_features_of_another_model_are_refused_though_the_first_rows_are_right(
    root: Path, tmp_path: Path
) -> None:
    """The pool has 200 pictures. The last 60 rows of the cache are another model's."""
    task = {"pool": ("colours:train",), "test": ("colours",), "shots": (1,), "validation": 2}
    suites = {"few-shot": FewShot(tasks={"colours": task}, draws=1)}
    clip, file = saved(tmp_path)
    others = set((cache_root() / "features").glob("*"))
    certified(root, clip, file, suites, digest="of this test")
    certified(root, clip, file, suites, digest="of this test")  # cached, and right
    for path in set((cache_root() / "features").iterdir()) - others:
        with np.load(path) as arrays:
            features_NC = arrays["features"].copy()
            features_NC[140:] = np.roll(features_NC[140:], 1, axis=1)
            changed = {"features": features_NC, "labels": arrays["labels"]}
        np.savez(path, **changed)
    with pytest.raises(Unsound, match=r"\.npz holds embeddings that its model does not give; delete it\.$"):
        certified(root, clip, file, suites, digest="of this test")


def test_features_that_another_model_made_in_the_evaluation_are_refused(root: Path, tmp_path: Path) -> None:
    """The live model answers with what another one gave before, picture by picture."""
    clip, file = saved(tmp_path)
    other, honest, known = tiny_other().eval(), clip.model.visual, {}

    class Remembering(nn.Module):
        image_size = honest.image_size

        def forward(self, images: Tensor) -> Tensor:
            rows = []
            for image in images:
                key = image.numpy().tobytes()
                if key not in known:
                    known[key] = other.visual(image[None])[0]
                rows.append(known[key])
            return torch.stack(rows)

    clip.model.visual = Remembering()
    with pytest.raises(Unsound, match="its answers come from a hook, a patch or a cache"):
        certified(root, clip, file)


def test_transformers_method_is_no_replaced_code() -> None:
    """With the first of its models, which a text tower of Hugging Face's is, it adds `Module.smart_apply`."""
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    assert nn.Module.smart_apply.__module__ == "transformers.modeling_utils"  # type: ignore[union-attr]
    require_own_code(nn.Sequential(nn.Linear(2, 2)))
