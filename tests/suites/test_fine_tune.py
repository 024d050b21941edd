"""Fine-tuning: begins as the zero-shot classifier, learns, leaves the model alone, and is the same for every model.

Shape suffixes: N samples, S steps, Y classes.
"""

import copy
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.helpers import MODEL, equal, tiny_clip, tiny_moe
from tests.moe_helpers import upcycled
from upcycle_bench import record
from upcycle_bench.data import evalset, evalset_write, labelled
from upcycle_bench.evaluation import fine_tuning, probe_tasks
from upcycle_bench.evaluation.fine_tuning import Tuned, batch_rows, losses, predict, zero_shot_classifier
from upcycle_bench.evaluation.texts import class_embeddings
from upcycle_bench.model import weights
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.deepspeed_import import deepspeed
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.planning.plan import make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.run import run
from upcycle_bench.suite import EvalContext
from upcycle_bench.suites.few_shot import FewShot
from upcycle_bench.suites.fine_tune import FineTune, split_of_pool
from upcycle_bench.suites.zero_shot import ZeroShot
from upcycle_bench.training import session
from upcycle_bench.training.loop import parameter_groups
from upcycle_bench.training.session import open_session
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.flops import counted_flops
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream

REGISTRY = load_registry()
NAMES = ("red", "green", "blue")
TASK = {"pool": ("light",), "test": ("dark",), "shots": (3,), "validation": 3}
GRID = {"rates": (1e-9, 1e-3, 1e9), "steps": 20, "batch_size": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sets of 30 squares, whose colour only tells the class; the second is darker."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name, light in (("light", 200), ("dark", 150)):
        labels, pictures = [0, 1, 2] * 10, []
        for label in labels:
            pixels = rng.integers(0, 50, (8, 8, 3), dtype=np.uint8)
            pixels[..., label] += np.uint8(light)
            pictures.append(Image.fromarray(pixels))
        evalset_write.write_classification(root / name, zip(pictures, labels, strict=True), NAMES, ("a {c} one", "{c}"))
    evalset_write.write_retrieval(root / "captions", [(pictures[0], ["red"])])
    return root


@pytest.fixture(scope="module")
def models():
    dense = tiny_clip().model.eval()
    return {"dense": dense, "moe": upcycled(dense, tiny_moe()).eval()}


def context(root, model, **changes) -> EvalContext:
    clip = tiny_clip()
    return EvalContext(
        model=model, tokenizer=clip.tokenize, transform=clip.transform, root=root, device=torch.device("cpu"), **changes
    )


def suite(task=None, **changes) -> FineTune:
    return FineTune(tasks={"colours": TASK | (task or {})}, **(GRID | changes))


def weights_hash(model) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def acc1(result, dataset):
    return next(s.value for s in result.scores if (s.dataset, s.metric) == (dataset, "acc1"))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_it_learns_charges_the_grid_and_leaves_the_model_alone(root, models, kind, capsys):
    model = models[kind]
    before, mode = weights_hash(model), {name: module.training for name, module in model.named_modules()}
    with counted_flops() as counter:
        result = suite().evaluate(context(root, model))
    assert weights_hash(model) == before
    assert {name: module.training for name, module in model.named_modules()} == mode
    assert all(parameter.grad is None for parameter in model.parameters())

    zero_shot = ZeroShot(sets=("dark",), headlines={"in": ("dark",)}).evaluate(context(root, model))
    assert acc1(result, "colours/3-shot") == 1.0 > 0.7 > acc1(zero_shot, "dark")
    score = next(s for s in result.scores if s.metric == "acc1")
    assert (score.headline, score.samples, score.chance, score.standard_error) == ("fine-tune", 30, 1 / 3, 0.0)
    assert result.outcomes["colours/3-shot/correct@1"].all()

    notes = result.notes["colours/3-shot"]
    assert notes["rates"] == [1e-3] and notes["rates_at_the_edge"] == 0
    # A rate of next to nothing changes nothing, and the greatest one is no classifier any more, or guesses.
    tried = notes["validation_acc1"][0]
    assert list(tried) == ["1e-09", "0.001", "1000000000.0"] and tried["1e-09"] == notes["validation_acc1_before"][0]
    assert tried["0.001"] == 1.0 and (tried["1000000000.0"] is None or tried["1000000000.0"] < 1.0)
    assert capsys.readouterr().err == ""
    assert notes["trainings"] == 3
    with counted_flops() as one_image:
        model.encode_image(torch.zeros(1, 3, 8, 8))
    # Forward and backward are three forward passes: 3 rates x 20 steps of 8 images. Then 3 + 1 validations of 9 images,
    # and the test's 30. An MoE layer drops tokens in training; the prompts are what is counted around it besides.
    expected = (3 * 3 * 20 * 8 + 4 * 9 + 30) * one_image.get_total_flops()
    assert (0.8 if kind == "moe" else 0.97) * expected < notes["flops"] <= expected
    assert notes["flops"] == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_at_step_0_it_is_the_zero_shot_classifier(root, models, kind):
    """The same answers for every sample as the zero-shot suite's, and its likelihoods at the model's own scale."""
    model, here = models[kind], context(root, models[kind])
    classes_YC = class_embeddings(probe_tasks.first_set(suite().tasks["colours"], root), here, {})
    logits_NY, label_N = predict(zero_shot_classifier(model, classes_YC), labelled.index(root / "dark", "test"), here)
    expected = ZeroShot(sets=("dark",), headlines={"in": ("dark",)}).evaluate(here)
    correct_N = (logits_NY.argmax(1) == label_N).numpy()
    assert (correct_N == expected.outcomes["dark/correct@1"]).all() and 0 < correct_N.mean() < 1
    log_likelihood_N = logits_NY.log_softmax(1).gather(1, label_N[:, None])[:, 0]
    np.testing.assert_allclose(log_likelihood_N, expected.outcomes["dark/log_likelihood"], atol=1e-5)


def test_every_model_sees_the_same_samples_in_the_same_order_and_few_shot_does(root, models, monkeypatch):
    seen = {}
    train = fine_tuning.train

    def spy(classifier, images_N3HW, label_N, rows_SB, rate, recipe):
        content = hashlib.sha256(images_N3HW[rows_SB[:5].flatten()].numpy().tobytes()).hexdigest()
        seen.setdefault(name, []).append((content, label_N[rows_SB].tolist()))
        return train(classifier, images_N3HW, label_N, rows_SB, rate, recipe)

    monkeypatch.setattr(fine_tuning, "train", spy)
    results = {}
    for name, model in models.items():
        torch.manual_seed(len(name))  # no global state has a say
        results[name] = suite(steps=2, draws=2).evaluate(context(root, model))
    assert seen["dense"] == seen["moe"]
    assert len(seen["dense"]) == 6 and len({content for content, _ in seen["dense"]}) == 2  # two draws, three rates
    notes = [result.notes["colours/3-shot"]["manifests"] for result in results.values()]
    probe = FewShot(tasks={"colours": TASK}, draws=2).evaluate(context(root, models["dense"]))
    assert notes[0] == notes[1] == probe.notes["colours/3-shot"]["manifests"]
    again = suite(steps=2, draws=2).evaluate(context(root, models["moe"]))
    assert [s.value for s in again.scores] == [s.value for s in results["moe"].scores]
    assert next(s.standard_error for s in again.scores) == next(s.standard_error for s in results["moe"].scores)


def test_the_whole_pool(root, models):
    result = suite({"shots": (), "all": True}).evaluate(context(root, models["dense"]))
    assert acc1(result, "colours/all") == 1.0
    task = suite({"all": True}).tasks["colours"]
    data = probe_tasks.load_images(task, context(root, models["dense"]))
    assert (len(data.pool), len(data.test), data.classnames) == (30, 30, NAMES)
    split = split_of_pool("colours", task, data)
    assert (len(split.train), len(split.validation)) == (30 - 9, 9)
    offsets = [set(map(tuple, part.place_N3.tolist())) for part in (split.train, split.validation)]
    assert len(offsets[0] | offsets[1]) == 30


def test_the_index_reads_what_the_sets_hold(root, models):
    """The slow way: evalsets.read decodes whole sets."""
    clip = tiny_clip()
    for name in ("light", "dark"):
        parts = list(evalset.read(root / name, clip.transform, 7).batches)
        samples = labelled.index(root / name, "test")
        assert samples.label_N.tolist() == [int(label) for _, labels in parts for label in labels]
        ours = torch.cat([images for images, _ in samples.batches(clip.transform, 4)])
        assert torch.equal(ours, torch.cat([torch.as_tensor(images) for images, _ in parts]))
    task = suite({"pool": ("light", "dark"), "test": ()}).tasks["colours"]
    both = probe_tasks.load_images(task, context(root, models["dense"])).pool
    assert both.label_N.tolist() == [0, 1, 2] * 20
    dark = torch.cat([images for images, _ in both.take(np.arange(30, 60)).batches(clip.transform, 8)])
    assert torch.equal(dark, ours)


def test_the_load_balancing_loss_reaches_the_routers(models):
    classifier = zero_shot_classifier(models["moe"], torch.eye(3, 32)).train()
    layers = moe_layers(classifier)
    assert list(layers) == ["vision.1", "vision.3"]
    images, label_N = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2] * 2)
    terms = losses(classifier(images), label_N, layers, 0.5)
    assert terms["load_balance"].item() == pytest.approx(0.5 * sum(x.l_aux.item() for x in layers.values()), rel=1e-6)
    terms["load_balance"].backward()
    assert all(layer.router_weight.grad.abs().max() > 0 for layer in layers.values())
    assert classifier.head.weight.grad is None
    assert list(losses(torch.zeros(2, 3), torch.tensor([0, 1]), {}, 0.5)) == ["cross_entropy"]


def test_a_model_that_an_engine_trained_can_be_copied(models):
    """Its layers belong to process groups, which cannot be copied, and DeepSpeed's marks, which a copy would lose."""
    model = copy.deepcopy(models["moe"])
    with session.open_session(1):
        optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=0.1)
        config = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2}
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0].destroy()
        assert all(layer.gate.ep_group is not None for layer in moe_layers(model).values())
        twin = copy.deepcopy(model)
        assert all(layer.gate.ep_group is None for layer in moe_layers(twin).values())
        images = torch.randn(3, 3, 8, 8)
        assert torch.equal(twin.encode_image(images), model.encode_image(images))
    named = dict(twin.named_parameters())
    experts = {name for name, value in model.named_parameters() if not getattr(value, "allreduce", True)}
    assert experts and all(("deepspeed_experts" in name) == (name in experts) for name in named)
    assert {name for name, value in named.items() if not getattr(value, "allreduce", True)} == experts
    assert {named[name].group_name for name in experts} == {"ep_size_1"}
    groups = [group["params"] for group in parameter_groups(twin, 0.1) if group.get("moe")]
    assert sum(len(group) for group in groups) == len(experts)


def test_patch_dropout_and_precision_do_not_follow_the_model(root):
    """The evaluated model may have been trained with patch dropout; its file does not say so."""
    plain, dropping = (create_clip(MODEL, seed=0, patch_dropout=share).model.eval() for share in (0.0, 0.5))
    results = [suite(steps=3).evaluate(context(root, model)) for model in (plain, dropping)]
    assert acc1(results[0], "colours/3-shot") == acc1(results[1], "colours/3-shot")
    made = [result.notes["colours/3-shot"]["validation_acc1"] for result in results]
    assert made[0] == made[1]
    assert dropping.visual.patch_dropout.prob == 0.5
    bf16 = zero_shot_classifier(plain, torch.eye(3, 32), "bf16")
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(bf16.eval()(images), zero_shot_classifier(plain, torch.eye(3, 32)).eval()(images))
    assert not torch.equal(bf16.train()(images), bf16.eval()(images))


def test_batches_are_epochs_of_permutations():
    rows_SB = batch_rows(10, steps=5, batch_size=4, rng=Stream(("x",)))
    assert rows_SB.shape == (5, 4)
    for epoch in (rows_SB[0:2], rows_SB[2:4]):
        assert len(set(epoch.flatten().tolist())) == 8
    assert batch_rows(3, steps=2, batch_size=64, rng=Stream(("x",))).sort().values.tolist() == [[0, 1, 2]] * 2


def test_a_rate_at_the_edge_is_a_warning(root, models, capsys):
    result = suite(rates=(1e-3, 1e9, 1e10)).evaluate(context(root, models["dense"]))
    assert result.notes["colours/3-shot"]["rates_at_the_edge"] == 1
    error = capsys.readouterr().err
    assert error == (
        "warning: fine-tune, colours/3-shot: the best learning rate, 0.001, is at the edge of the grid "
        "(0.001, 1e+09, 1e+10) in 1 of 1 draws.\n"
    )


@pytest.mark.parametrize(
    ("accuracies", "warned"),
    [
        ((0.9, 0.9, 0.8, 0.2), False),  # a tie with a rate within, of which the lower one wins
        ((0.9, 0.8, 0.8, 0.2), True),
        ((0.7, 0.8, 0.8, 0.9), True),
        ((0.9, 0.8, None, 0.9), True),  # a tie of both ends
        ((0.7, 0.9, 0.8, 0.9), False),
        ((0.1, None, None, None), True),
    ],
)
def test_only_a_strictly_better_edge_is_a_warning(accuracies, warned):
    rates = (1e-5, 1e-4, 1e-3, 1e-2)
    best = max(value for value in accuracies if value is not None)
    tuned = Tuned(None, rates[accuracies.index(best)], dict(zip(rates, accuracies, strict=True)), 0.1)
    assert tuned.at_the_edge == warned


def test_what_cannot_be_tuned_is_said_in_one_line(root, models, monkeypatch):
    here = context(root, models["dense"])
    with pytest.raises(UserError, match=r"colours/3-shot: training diverged at every learning rate; lower `rates`"):
        suite(rates=(1e30, 1e32, 1e34)).evaluate(here)
    with pytest.raises(UserError, match=r"class 'red' has 10 samples, but 3 shots, 8 for validation"):
        suite({"validation": 8}).evaluate(here)
    with pytest.raises(UserError, match="captions: it has captions, not labels"):
        suite({"pool": ("captions",)}).evaluate(here)
    with pytest.raises(UserError, match="only open_clip's ViT CLIP models can be fine-tuned"):
        suite().evaluate(replace(here, model=_WithoutTower(models["dense"])))
    monkeypatch.setattr(fine_tuning, "MEMORY", 100)
    with pytest.raises(UserError, match="9 training images would take 0 GiB of memory, more than 0; fine"):
        suite().evaluate(here)
    with session.open_session(1), monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 2)
        with pytest.raises(UserError, match="the work of one process; score the record with `upcycle-bench evaluate"):
            suite().evaluate(here)
    with pytest.raises(UserError, match="suite fine-tune scores only what a protocol names"):
        FineTune.of_set(root / "light")


class _WithoutTower(torch.nn.Module):
    """A text tower alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.logit_scale = model, model.logit_scale

    def encode_text(self, *args, **kwargs):
        return self.model.encode_text(*args, **kwargs)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ({"label": "set", "test": ()}, {}, 'label = "set" has no prompts'),
        ({"shots": ()}, {}, "give shots, or all = true"),
        ({"shots": (0,)}, {}, "shots are different numbers from 1 on"),
        ({"all": True, "test": ()}, {}, "all = true leaves nothing of the pool; give a test set"),
        ({}, {"rates": (1e-3, 1e-4, 1e-5)}, "in ascending order"),
        ({}, {"rates": (0.0, 1e-4, 1e-3)}, "different positive numbers"),
        ({}, {"rates": (1e-4, 1e-3)}, "at least 3 items"),
    ],
)
def test_settings_that_make_no_sense_are_refused(task, changes, message):
    with pytest.raises(ValidationError, match=message):
        suite(task, **changes)


def test_a_run_of_experts_is_tuned_where_it_was_trained(quick, tmp_path):
    """The evaluated model comes from the training's engine; the certificate watches it; other fingerprints stay."""
    settings = ["optional_suites.fine-tune.steps=3", "optional_suites.fine-tune.batch_size=16"]

    def plan(*overrides, suites=("zero-shot", "fine-tune")):
        protocol = load_protocol(REGISTRY.protocols["smoke"].target, [*quick, *overrides])
        return make_plan(REGISTRY, "sparse-upcycling", protocol, suites=suites)

    usual, changed = plan(suites=()), plan(*settings)
    assert list(usual.suites) == ["zero-shot"]
    assert changed.training_fingerprint == usual.training_fingerprint
    assert changed.suite_fingerprints["zero-shot"] == usual.suite_fingerprints["zero-shot"]
    assert changed.suite_fingerprints["fine-tune"] != plan().suite_fingerprints["fine-tune"]

    made = record.read(run(changed, tmp_path, Reporter()))
    assert (made.status, made.skipped) == ("ok", {})
    found = {(s.dataset, s.metric): s for s in made.scores if s.suite == "fine-tune"}
    assert found.keys() == {("digits/5-shot", name) for name in ("acc1", "acc5", "mean_per_class_recall")}
    score = found["digits/5-shot", "acc1"]
    assert score.standard_error > 0 and not score.headline  # zero-shot is the first suite, and has the headlines
    assert made.certificate is not None and made.certificate.choices_routed > 0
    assert made.cost.phases["evaluate"].flops > made.suite_notes["fine-tune"]["digits/5-shot"]["flops"] > 0
    # Scored again from the file of weights, it is the same.
    clip = weights.load(weights.of_record(tmp_path, made.hashes.weights))
    here = context(changed.world.eval_root, clip.model)
    again = changed.suites["fine-tune"].evaluate(here)
    assert acc1(again, "digits/5-shot") == score.value


def test_of_equal_rates_the_lowest_is_chosen(root, models):
    notes = suite(rates=(1e-9, 2e-9, 3e-9), steps=1).evaluate(context(root, models["dense"])).notes["colours/3-shot"]
    assert len(set(notes["validation_acc1"][0].values())) == 1
    assert notes["rates"] == [1e-9]


def test_sampling_of_second_experts_has_a_stream_of_its_own(root, models):
    """The state of torch's global generator does not matter."""
    model = upcycled(models["dense"], tiny_moe(second_expert_sampling=True)).eval()
    samples = labelled.index(root / "light", "test")
    settings = {"rates": (1e-3,), "steps": 2, "batch_size": 8, "weight_decay": 0.1, "load_balance": 0.0}
    recipe = fine_tuning.Recipe(**settings, precision="fp32")
    made = []
    with open_session(1):
        for seed in (1, 2):
            torch.manual_seed(seed)
            arguments = (torch.eye(3, 32), samples, samples, recipe, Stream(("x",)), context(root, model), "x")
            made.append(fine_tuning.tune(model, *arguments).classifier.state_dict())
    assert equal(*made)
