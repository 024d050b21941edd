"""Zero-shot on a world without training: equal to CLIP_benchmark, with the templates of the protocol."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification
from pydantic import ValidationError
from typer.testing import CliRunner

from tests.evaluation.contexts import context_of
from tests.helpers import tiny_clip
from upcycle_bench import api
from upcycle_bench.cli import app
from upcycle_bench.data.worlds import fashion, load_world
from upcycle_bench.model.clip import create_clip
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.suite import EvalContext
from upcycle_bench.suites.out_of_domain import OutOfDomain
from upcycle_bench.util.errors import UserError

PATHS = {name: entry.target for name, entry in load_registry().protocols.items()}
TEMPLATES = ("{c}", "the digit {c}")


def suite(**changes: object) -> OutOfDomain:
    settings = {"world": "digits", "sets": ("digits-test",), "templates": TEMPLATES}
    return OutOfDomain(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture
def context(tmp_path: Path) -> EvalContext:
    return context_of(tiny_clip(), tmp_path)


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle")
def test_it_scores_as_clip_benchmark_with_the_protocols_templates(context: EvalContext) -> None:
    result = suite().evaluate(context)
    found = {score.metric: score for score in result.scores}
    root = load_world("digits", 0).eval_root / "digits-test"
    dataset = build_dataset("wds/digits-test", root=str(root), transform=context.transform, split="test")
    loader = torch.utils.data.DataLoader(dataset.batched(64), batch_size=None)
    theirs = zeroshot_classification.evaluate(
        context.model, loader, context.tokenizer, dataset.classes, list(TEMPLATES), "cpu", amp=False
    )
    assert list(dataset.templates) != list(TEMPLATES)
    assert found["acc1"].value == pytest.approx(theirs["acc1"])
    assert found["acc5"].value == pytest.approx(theirs["acc5"])
    assert [(score.metric, score.headline) for score in result.scores if score.headline] == [("acc1", "out-of-domain")]
    assert (found["acc1"].chance, found["acc1"].samples) == (0.1, 359)
    share = found["acc1"].value
    assert found["acc1"].standard_error == pytest.approx(math.sqrt(share * (1 - share) / 359))
    assert result.outcomes["digits-test/correct@1"].mean() == share
    mean = float(result.outcomes["digits-test/log_likelihood"].mean())
    assert found["log_likelihood"].value == pytest.approx(mean, rel=1e-6)
    own = math.exp(float(context.model.logit_scale.detach()))  # type: ignore[operator]
    assert result.outcomes["temperature/logit_scale"] == pytest.approx([own])


def test_the_scale_is_fitted_to_other_images(context: EvalContext) -> None:
    own, fitted = (suite(temperature_set=name).evaluate(context) for name in ("", "digits-validation"))
    mean = {
        name: next(score.value for score in result.scores if score.metric == "log_likelihood")
        for name, result in (("own", own), ("fitted", fitted))
    }
    # A random model knows nothing, so its best scale is small, unlike its own scale.
    assert mean["fitted"] == pytest.approx(math.log(0.1), abs=0.02)
    assert mean["own"] < mean["fitted"]
    assert (own.outcomes["digits-test/rank"] == fitted.outcomes["digits-test/rank"]).all()
    sources = suite(temperature_set="digits-validation").sources(context.root)
    assert list(sources) == ["digits/digits-test", "digits/digits-validation"]


def test_what_cannot_be_scored_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="digits is the world of this run, so nothing here is out of domain"):
        suite().sources(load_world("digits", 0).eval_root)
    monkeypatch.setattr(fashion, "FOLDER", tmp_path / "nowhere")
    with pytest.raises(UserError, match="install Debian's package"):
        suite(world="fashion-mnist", sets=("fashion-mnist",)).sources(tmp_path)
    with pytest.raises(ValidationError, match="every template holds"):
        suite(templates=("a digit",))
    with pytest.raises(ValidationError, match="temperature set is none of them"):
        suite(temperature_set="digits-test")


def test_captions_are_refused(context: EvalContext) -> None:
    with pytest.raises(UserError, match="digits-retrieval has captions, not labels"):
        suite(sets=("digits-retrieval",)).evaluate(context)


def test_evaluate_scores_the_labs_digits_without_the_labs_data(tmp_path: Path) -> None:
    """Suites without their sets, here those of the lab's own sets, are skipped with the reason."""
    checkpoint = tmp_path / "model.safetensors"
    api.save(create_clip("smoke-vit", seed=3).model, checkpoint, "smoke-vit")
    (tmp_path / "sets").mkdir()
    arguments = ["evaluate", checkpoint, "-p", "lab", "--data", tmp_path / "sets", "--json", "--suite"]
    result = CliRunner().invoke(app, [*map(str, arguments), "compositional,out-of-domain"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert list(facts["suite_fingerprints"]) == ["out-of-domain"]
    assert list(facts["skipped"]) == ["compositional"]
    assert facts["skipped"]["compositional"].startswith("evaluation set not found: test-carbon-retrieval")
    assert {score["suite"] for score in facts["scores"]} == {"out-of-domain"}
    assert len([score for score in facts["scores"] if score["headline"]]) == 1
    assert np.isfinite([score["value"] for score in facts["scores"]]).all()


def test_every_lab_asks_for_the_same_digits() -> None:
    settings = [load_protocol(PATHS[name]).optional_suites["out-of-domain"] for name in PATHS if "lab" in name]
    assert len(settings) >= 5 and all(each == settings[0] for each in settings)
    assert "out-of-domain" not in load_protocol(PATHS["smoke"]).optional_suites  # its world is the digits
