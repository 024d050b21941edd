"""No suite scores a model that has diverged: each ends with one line that names the set, whichever tower it reads."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import QUICK
from tests.evaluation.contexts import context_of
from tests.helpers import SMOKE, tiny_clip, tiny_moe
from tests.moe_helpers import upcycled
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.planning.plan import make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.suite import Suite
from upcycle_bench.util.errors import UserError

READS_TEXTS = ("zero-shot", "fine-tune", "diagnostics", "compositional")
READS_IMAGES = (*READS_TEXTS, "few-shot", "linear-probe")


@pytest.fixture(scope="module")
def suites() -> dict[str, Suite]:
    found = make_plan(load_registry(), "dense-frozen", load_protocol(SMOKE, QUICK), suites=["all"]).suites
    assert set(found) == set(READS_IMAGES)
    return dict(found)


def diverged(tower: str) -> Any:
    """A mixture of experts one of whose experts has diverged, in that tower alone."""
    model = upcycled(tiny_clip().model, tiny_moe(experts=2)).eval()
    with torch.no_grad():
        moe_layers(model)[f"{tower}.1"].experts[0].c_proj.weight.fill_(torch.nan)
    return model


@pytest.mark.parametrize(
    ("tower", "name"),
    [*(("vision", name) for name in READS_IMAGES), *(("text", name) for name in READS_TEXTS)],
)
def test_a_diverged_tower_has_no_score(suites: dict[str, Suite], tower: str, name: str) -> None:
    root: Path = load_world("digits", 0).eval_root
    context = context_of(tiny_clip(), root)
    with pytest.raises(UserError, match=r"(embeddings of \S+ are not finite|digits\S* are not finite)") as raised:
        suites[name].evaluate(context.__class__(**{**vars(context), "model": diverged(tower)}))
    assert "\n" not in str(raised.value)


def test_a_fine_tuning_of_a_diverged_image_tower_names_its_task(suites: dict[str, Suite]) -> None:
    context = context_of(tiny_clip(), load_world("digits", 0).eval_root)
    with pytest.raises(UserError, match="the model's embeddings of digits/5-shot are not finite"):
        suites["fine-tune"].evaluate(context.__class__(**{**vars(context), "model": diverged("vision")}))
