"""Routing of evaluation sets: the report describes what a constructed router does, at every batch size."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from tests.evaluation.contexts import context_of
from tests.helpers import initialise, tiny_clip, tiny_moe
from tests.records import make_record
from upcycle_bench import cli, record
from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data import evalset_write
from upcycle_bench.evaluation.agreement import agreement, agreements, main_expert
from upcycle_bench.evaluation.routes import route_images, route_texts
from upcycle_bench.evaluation.score import headlines_of
from upcycle_bench.model import weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.measure import compactness_of_moments, relative_compactness
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.planning.plan import make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.reporting import formats, leaderboard
from upcycle_bench.reporting.contact_sheets import GAP, LEFT, SMALL, draw, find_model, most_taken
from upcycle_bench.run import run
from upcycle_bench.suite import EvalContext
from upcycle_bench.suites.diagnostics import Diagnostics
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import PluginError, UserError
from upcycle_bench.util.progress import Reporter

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
PER_SET = 15


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of plain squares, one lighter than the other, and one with captions of the lighter ones."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name, light in (("plain", 0), ("light", 25)):
        pictures = []
        for number in range(PER_SET):
            pixels = np.array(list(COLOURS.values())[number % 3]) + light + rng.integers(-15, 1, (16, 16, 3))
            pictures.append((Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), number % 3))
        evalset_write.write_classification(root / name, pictures, tuple(COLOURS), ("{c}", "a {c} square"))
    captions = [(picture, (f"{list(COLOURS)[label]} number {n}",)) for n, (picture, label) in enumerate(pictures)]
    evalset_write.write_retrieval(root / "captions", captions)
    return root


@pytest.fixture(scope="module")
def clip() -> Clip:
    """Four experts a layer, all different."""
    clip, moe = tiny_clip(), tiny_moe()
    strategy = load_registry().strategies["sparse-upcycling"].target()
    model = put_experts(clip.model, initialise(strategy, clip, seed=0).inits, moe).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in moe_layers(model).values():
            for parameter in layer.experts.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return replace(clip, model=model)


def context(clip: Clip, root: Path, batch_size: int = 256) -> EvalContext:
    return context_of(clip, root, batch_size=batch_size)


def opened(clip: Clip, root: Path, *names: str, batch_size: int = 256) -> list[evalsets.EvalSet]:
    return [evalsets.read(root / name, clip.transform, batch_size) for name in names]


# ---- agreement ----------------------------------------------------------------------------------------------------


def test_mutual_information_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    label_I = rng.integers(0, 30, 400)
    expert_I = np.where(rng.random(400) < 0.4, label_I % 5, rng.integers(0, 5, 400))
    weight_IE = np.eye(5, dtype=int)[expert_I]
    found = agreements(weight_IE, {"class": label_I})
    assert found["nmi_class"].value == pytest.approx(normalized_mutual_info_score(label_I, expert_I), rel=1e-9)
    assert found["ami_class"].value == pytest.approx(adjusted_mutual_info_score(label_I, expert_I), rel=1e-9)
    # (NMI - chance) / (1 - chance) is the adjusted value, up to the noise of 20 permutations.
    nmi = found["nmi_class"]
    assert 0.05 < nmi.chance < nmi.value
    assert (nmi.value - nmi.chance) / (1 - nmi.chance) == pytest.approx(found["ami_class"].value, abs=0.02)
    # Every token counts; the permutations deal labels to items.
    count_IE = rng.integers(0, 9, (400, 5))
    tokens = agreement(count_IE, label_I)
    each_label, each_expert = (
        np.repeat(label_I, count_IE.sum(1)),
        np.concatenate([np.repeat(range(5), n) for n in count_IE]),
    )
    assert tokens.value == pytest.approx(normalized_mutual_info_score(each_label, each_expert), rel=1e-9)
    assert tokens.samples == count_IE.sum()


def test_perfect_independent_and_collapsed_routing() -> None:
    label_I = np.arange(4000) % 4
    perfect = agreements(np.eye(4)[(label_I + 1) % 4], {"class": label_I, "set": np.zeros(4000, int)})
    assert perfect.keys() == {"nmi_class", "ami_class", "token_nmi_class"}  # a single set gives no agreement with sets
    assert [found.value for found in perfect.values()] == pytest.approx([1, 1, 1])
    independent = agreements(np.eye(4)[np.random.default_rng(1).integers(0, 4, 4000)], {"class": label_I})
    assert max(abs(found.value) for found in independent.values()) < 0.005
    collapsed = agreements(np.eye(4)[np.zeros(4000, int)], {"class": label_I})
    assert [found.value for found in collapsed.values()] == [0, 0, 0]
    half = np.where(np.arange(4000) < 2000, label_I, -1)  # the others have no label
    assert agreements(np.eye(4)[label_I], {"class": half})["nmi_class"].samples == 2000


# ---- routes -------------------------------------------------------------------------------------------------------


def test_routes_by_loops_over_single_images_and_texts(clip: Clip, root: Path) -> None:
    images = route_images(opened(clip, root, "plain", "captions"), context(clip, root))
    texts = route_texts(opened(clip, root, "plain", "captions"), context(clip, root))
    assert list(images.labels["class"]) == [n % 3 for n in range(PER_SET)] + [-1] * PER_SET
    assert list(images.labels["set"]) == [0] * PER_SET + [1] * PER_SET
    assert list(texts.labels["class"]) == [0, 0, 1, 1, 2, 2] + [-1] * PER_SET
    assert list(texts.labels["set"]) == [-1] * 6 + [1] * PER_SET

    layers = moe_layers(clip.model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        layer.gate.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for evalset in opened(clip, root, "plain", "captions", batch_size=1):
            for image, _ in evalset.batches:
                clip.model.encode_image(image)
        prompts = [text for name in COLOURS for text in (name, f"a {name} square")]
        for text in [*prompts, *(c[0] for _, cs in opened(clip, root, "captions")[0].batches for c in cs)]:
            clip.model.encode_text(clip.tokenize([text]))
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        routes = (images if name.startswith("vision") else texts).layers[name]
        chosen, entropies, first, probabilities = np.zeros(4), [], [], np.zeros(4)
        for x_TD in seen[name]:
            probs_TE = torch.softmax(x_TD @ layer.router_weight.T, dim=1).detach().double().numpy()
            entropies += [-(p * np.log(p)).sum() for p in probs_TE]
            first.append([int((probs_TE.argmax(1) == expert).sum()) for expert in range(4)])
            for p in probs_TE:
                for expert in np.argsort(-p)[:2]:
                    chosen[expert] += 1
                    probabilities[expert] += p[expert]
        found = routes.numbers()
        assert routes.load_E == pytest.approx(chosen / chosen.sum()) and routes.load_E.sum() == pytest.approx(1)
        assert found["router_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
        assert routes.routing_probability == pytest.approx(probabilities / chosen, rel=1e-5)
        assert routes.first_IE.tolist() == first
        assert found["load_variation"] == pytest.approx(np.std(chosen) / np.mean(chosen))
        assert (found["dead_experts"], found["tokens_dropped"]) == (0, 0)
        assert found["utilisation_max"] == routes.load_E.max()


def test_compactness_from_moments_is_that_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    out_RD = [torch.randn(n, 9, generator=generator) + place for place, n in enumerate((5, 0, 8, 30))]
    rows_E = torch.tensor([float(len(rows)) for rows in out_RD], dtype=torch.float64)
    sum_ED = torch.stack([rows.double().sum(0) for rows in out_RD])
    second_DD = sum(rows.double().T @ rows.double() for rows in out_RD)
    assert compactness_of_moments(rows_E, sum_ED, second_DD) == pytest.approx(relative_compactness(out_RD), rel=1e-9)
    assert compactness_of_moments(rows_E[:1], sum_ED[:1], second_DD) is None


# ---- the suite ----------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_batch_size(clip: Clip, root: Path) -> None:
    suite = Diagnostics(images=("plain", "light"), texts=("captions", "plain"))
    first, second = (suite.evaluate(context(clip, root, batch_size)) for batch_size in (256, 7))
    assert first.skipped == {} and first.outcomes.keys() == second.outcomes.keys()
    for one, other in zip(first.scores, second.scores, strict=True):
        assert (one.dataset, one.metric, one.samples) == (other.dataset, other.metric, other.samples)
        assert one.value == pytest.approx(other.value, rel=1e-5, abs=1e-9)
        assert one.higher_is_better is None and not one.headline
    values = {(score.dataset, score.metric): score.value for score in first.scores}
    for metric in ("load_variation", "nmi_class", "ami_set"):  # a tower is the mean of its layers
        assert values["vision", metric] == pytest.approx((values["vision.1", metric] + values["vision.3", metric]) / 2)
    assert ("text.1", "nmi_class") in values and ("text.1", "nmi_set") not in values  # captions are of one set
    assert sum(first.notes["vision.1"]["load"]) == pytest.approx(1)
    assert first.outcomes["vision.3/main_expert"].shape == (2 * PER_SET,)


@pytest.fixture(scope="module")
def specialised(clip: Clip, root: Path) -> Clip:
    """The first vision layer's router is made for the colours: experts 0 to 2 take red, green, blue, 3 takes none."""
    clip = replace(clip, model=copy.deepcopy(clip.model))
    gate = moe_layers(clip.model)["vision.1"].gate
    inputs: list[torch.Tensor] = []
    handle = gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    labels = []
    for evalset in opened(clip, root, "plain", "light"):
        for images, label_B in evalset.batches:
            with torch.no_grad():
                clip.model.encode_image(images)
            labels.append(torch.as_tensor(label_B).repeat_interleave(len(inputs[-1]) // len(images)))
    handle.remove()
    wanted_TE = -20 * torch.ones(sum(map(len, inputs)), 4)
    wanted_TE.scatter_(1, torch.cat(labels)[:, None], 20.0)
    with torch.no_grad():
        gate.wg.weight.copy_(torch.linalg.lstsq(torch.cat(inputs), wanted_TE).solution.T)
    return clip


def test_experts_for_colours_agree_with_classes_and_not_with_sets(specialised: Clip, root: Path) -> None:
    routed = route_images(opened(specialised, root, "plain", "light"), context(specialised, root))
    routes = routed.layers["vision.1"]
    assert list(main_expert(routes.first_IE)) == [n % 3 for n in range(PER_SET)] * 2
    found = agreements(routes.first_IE, routed.labels)
    for metric in ("nmi_class", "ami_class", "token_nmi_class"):
        assert found[metric].value == pytest.approx(1)
    assert found["nmi_set"].value == pytest.approx(0, abs=1e-9) and found["nmi_class"].chance < 0.2


def test_a_dense_model_is_skipped_with_the_reason_and_keeps_its_place(quick: list[str], tmp_path: Path) -> None:
    protocol = load_protocol(load_registry().protocols["smoke"].target, quick)
    with pytest.raises(UserError, match="diagnostics has no headline score"):
        make_plan(load_registry(), "dense-frozen", protocol, suites=("diagnostics",))
    planned = make_plan(load_registry(), "dense-frozen", protocol, suites=("zero-shot", "diagnostics"))
    made = record.read(run(planned, tmp_path, Reporter()))  # type: ignore[arg-type]
    assert made.skipped == {"diagnostics/experts": "a dense model has no experts and no routers"}
    assert made.protocol.suite_fingerprints == planned.suite_fingerprints  # one table for both
    assert made.headlines and {score.suite for score in made.scores} == {"zero-shot"}


def test_descriptive_scores_are_no_part_of_a_headline_and_stand_in_csv() -> None:
    part = {
        "suite": "diagnostics", "dataset": "vision.1", "metric": "nmi_class", "value": 0.25, "higher_is_better": None,
        "chance": 0.1, "samples": 9, "headline": "",
    }  # fmt: skip
    usual = make_record().model_dump(mode="json")["scores"]
    boards = leaderboard.build([make_record(), make_record("sparse-upcycling", scores=[*usual, part])])
    assert "diagnostics/vision.1/nmi_class" in formats.render(boards, "csv")
    assert "nmi_class" not in formats.render(boards, "md")
    for direction in (True, False):
        headline = {"value": 0.25, "higher_is_better": direction, "chance": 0.1, "standard_error": None}
        with pytest.raises(ValueError, match="headline in: a part has another direction"):
            make_record(scores=[part | {"headline": "in"}], headlines={"in": headline})
    with pytest.raises(PluginError, match="headline score in: all its parts must be higher-is-better, or all lower-is"):
        headlines_of([part | {"headline": "in"}])
    up, down = ({**part, "headline": "in", "higher_is_better": direction} for direction in (True, False))
    with pytest.raises(PluginError, match="headline score in: all its parts"):
        headlines_of([up, down])


# ---- the sheets ---------------------------------------------------------------------------------------------------


def test_sheets_have_the_right_images_in_the_right_rows(specialised: Clip, root: Path) -> None:
    columns = 12
    sheets = draw(specialised, context(specialised, root), ["plain", "light"], columns=columns, title="colours")
    assert list(sheets) == ["vision.1", "vision.3"]
    pixels = np.asarray(sheets["vision.1"].image).astype(int)
    top, step = pixels.shape[0] - 4 * (SMALL + GAP), SMALL + GAP
    for expert in range(4):
        row = pixels[top + expert * step : top + expert * step + SMALL]
        cells = [row[:, LEFT + column * step : LEFT + column * step + SMALL] for column in range(columns)]
        if expert == 3:
            assert all((cell == 255).all() for cell in cells)  # it takes nothing
        else:
            strongest = [cell.mean(axis=(0, 1)).argmax() for cell in cells[:10]]
            assert strongest == [expert] * 10
            assert all((cell == 255).all() for cell in cells[10:])  # there are ten of each colour
        assert (row[:, :LEFT] < 128).any()  # the number and the load of the expert
    assert sheets["vision.1"].load_E.sum() == pytest.approx(1)


def test_most_taken_orders_by_share_then_probability() -> None:
    """The share of an image's tokens, not the mean probability, comes first, by hand: four images, two experts."""
    first_IE = np.array([[1, 3], [2, 2], [2, 2], [0, 4]])
    mean_IE = np.array([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6], [0.2, 0.8]])
    routes: Any = SimpleNamespace(first_IE=first_IE, mean_IE=mean_IE)
    assert most_taken(routes, 4) == [[2, 1, 0], [3, 0, 1, 2]]  # image 3 has no token for expert 0
    assert most_taken(routes, 2) == [[2, 1], [3, 0]]
    routes.mean_IE = np.full((4, 2), 0.5)
    assert most_taken(routes, 4) == [[1, 2, 0], [3, 0, 1, 2]]  # of equals the first


def test_the_command_and_its_errors(
    specialised: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = weights.save(specialised, tiny_moe(), cache_root() / "weights")
    stored = cache_root() / "weights" / f"{digest}.safetensors"
    path = record.write(make_record("sparse-upcycling", hashes={"weights": digest}), None, tmp_path)

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["upcycle-bench", "experts", *arguments, "--protocol", "smoke"])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        return leave.value.code, *capsys.readouterr()

    sheets = tmp_path / "sheets"
    code, out, _ = call(str(path), "--output", str(sheets), "--columns", "3", "--json")
    assert code == 0
    said = json.loads(out)
    assert said["images"] == ["digits-test"] and list(said["layers"]) == ["vision.1", "vision.3"]
    assert sorted(file.name for file in sheets.iterdir()) == ["vision.1.png", "vision.3.png"]
    with Image.open(said["layers"]["vision.3"]["sheet"]) as image:
        assert image.width == LEFT + 3 * (SMALL + GAP) + GAP
    assert 0 < said["layers"]["vision.1"]["agreement"]["nmi_class"]["value"] < 1

    (dense := tmp_path / "dense").mkdir()
    dense_digest = weights.save(tiny_clip(), tiny_moe(), dense)
    stored.write_bytes(b"no")
    for given, words in (
        (path, "is not what its name says"),
        (tmp_path, "is a folder"),
        (dense / f"{dense_digest}.safetensors", "a dense model has no experts"),
    ):
        code, _, err = call(str(given), "--output", str(sheets))
        assert code == 2 and words in err and err.count("\n") == 1
    stored.unlink()
    with pytest.raises(UserError, match=r"are not in this machine's cache \(.*weights.*copy them"):
        find_model(path)
