"""`evaluate` scores any checkpoint as a run would, and a user's own photos; it names what it cannot score."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests import photos
from tests.conftest import QUICK
from upcycle_bench import api, record
from upcycle_bench.cli import app
from upcycle_bench.data import evalset_write
from upcycle_bench.data.worlds import lab
from upcycle_bench.model.clip import create_clip
from upcycle_bench.planning.plan import make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.run import run
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

ROOT = Path(__file__).parents[2]
REGISTRY = load_registry()


@pytest.fixture(autouse=True)
def _no_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to build the lab, which takes minutes."""

    def refuse(*_: object) -> None:
        raise UserError("the lab was asked for")

    monkeypatch.setattr(lab, "load", refuse)


def command(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model thrice: open_clip's weights, ours, and with experts."""
    folder, clip = tmp_path_factory.mktemp("models"), create_clip("smoke-vit", seed=3)
    paths = {name: folder / f"{name}.safetensors" for name in ("plain", "ours", "moe")}
    save_file(clip.model.state_dict(), paths["plain"])
    api.save(clip.model, paths["ours"], "smoke-vit")
    api.save(api.upcycle(clip.model, "sparse-upcycling"), paths["moe"], "smoke-vit")
    return paths


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photos, made into sets by the code in docs/data.md, word for word."""
    folder = tmp_path_factory.mktemp("own")
    photos.write(folder / "photos")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, {})
    return folder / "sets"


def values(scores: list) -> dict:
    parts = [score if isinstance(score, dict) else score.model_dump() for score in scores]
    return {(score["suite"], score["dataset"], score["metric"]): score["value"] for score in parts}


def test_real_photos_go_through_everything(models: dict[str, Path], sets: Path, tmp_path: Path) -> None:
    checked = json.loads(command("data", "check", sets, "--json"))["sets"]
    assert [(each["name"], each["kind"], each["problems"]) for each in checked] == [
        ("photos", "classification", []),
        ("photos-captions", "retrieval", []),
    ]
    assert (checked[0]["samples"], checked[0]["rarest"]) == ({"test": 27, "train": 90}, {"test": 3, "train": 10})
    assert (checked[0]["classes"], checked[1]["samples"], checked[1]["captions"]) == (9, {"test": 2}, 3)

    output = tmp_path / "scores.json"
    table = command("evaluate", models["moe"], "--data", sets, "--suite", "all", "--output", output)
    facts = json.loads(output.read_text())
    found = values(facts["scores"])
    assert {key[:2] for key in found} == {
        ("zero-shot", "photos"),
        ("zero-shot", "photos-captions"),
        ("few-shot", "photos/1-shot"),
        ("few-shot", "photos/5-shot"),
        ("linear-probe", "photos"),
    }
    # Random features tell these photos apart; random prompts do not.
    assert found["few-shot", "photos/5-shot", "acc1"] > 0.6 > 1 / 9
    assert found["linear-probe", "photos", "acc1"] > 0.6 > found["zero-shot", "photos", "acc1"]
    unnamed = ("compositional", "diagnostics", "fine-tune", "out-of-domain")
    assert facts["skipped"] == {
        "few-shot/photos-captions": "it has captions, not labels.",
        "linear-probe/photos-captions": "it has captions, not labels.",
        **{
            f"{suite}/{name}": f"suite {suite} scores only what a protocol names; give --protocol."
            for suite in unnamed
            for name in ("photos", "photos-captions")
        },
    }
    proof = facts["certificate"]
    assert proof["predictions"] > 60 and proof["choices_routed"] > 0
    assert [repeat["differing"] for repeat in proof["repeats"]] == [0, 0]
    assert "evaluation set photos: 27 samples are too few for a control." in proof["uncontrolled"]
    assert (
        "certificate: " in table
        and "±, SE: one standard error, over evaluation samples" in table
        and "value (± SE)" in table
    )
    assert facts["parameters_active"] < facts["parameters_total"]
    together = "skipped: few-shot/photos-captions, linear-probe/photos-captions: it has captions, not labels."
    assert "photos/5-shot" in table and together in table
    assert table.count("scores only what a protocol names") == len(unnamed)  # every reason is printed once
    assert not any(score["headline"] for score in facts["scores"])

    with pytest.raises(UserError, match="--force replaces it"):
        command("evaluate", models["moe"], "--data", sets, "--output", output)
    command("evaluate", models["moe"], "--data", sets / "photos", "--output", output, "--force")
    alone = json.loads(output.read_text())
    assert values(alone["scores"]) == {key: found[key] for key in found if key[:2] == ("zero-shot", "photos")}
    assert alone["suite_fingerprints"] == {"zero-shot/photos": facts["suite_fingerprints"]["zero-shot/photos"]}


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle")
def test_photos_score_as_clip_benchmark_scores_them(models: dict[str, Path], sets: Path) -> None:
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification

    clip = api.load(models["ours"])
    dataset = build_dataset("wds/photos", root=str(sets / "photos"), transform=clip.transform, split="test")
    loader = torch.utils.data.DataLoader(dataset.batched(16), batch_size=None)
    theirs = zeroshot_classification.evaluate(
        clip.model, loader, clip.tokenize, dataset.classes, dataset.templates, "cpu", amp=False
    )
    ours = values(json.loads(command("evaluate", models["ours"], "--data", sets / "photos", "--json"))["scores"])
    for metric in ("acc1", "acc5", "mean_per_class_recall"):
        assert ours["zero-shot", "photos", metric] == pytest.approx(theirs[metric]), metric


def test_a_plain_open_clip_file_scores_as_the_same_model_of_ours(models: dict[str, Path], sets: Path) -> None:
    theirs, ours = (
        json.loads(command("evaluate", *given, "--data", sets, "--json"))
        for given in ((models["plain"], "--model", "smoke-vit"), (models["ours"],))
    )
    assert values(theirs["scores"]) == values(ours["scores"]) != {}
    assert theirs["parameters_active"] == theirs["parameters_total"]


def test_half_precision_is_scored_in_single_precision(models: dict[str, Path], sets: Path, tmp_path: Path) -> None:
    clip = api.load(models["moe"])
    half, rounded = tmp_path / "half.safetensors", tmp_path / "rounded.safetensors"
    api.save(clip.model.to(torch.bfloat16), half, "smoke-vit")
    assert load_file(half)["ln_final.weight"].dtype == torch.bfloat16
    api.save(clip.model.float(), rounded, "smoke-vit")
    first, second = (json.loads(command("evaluate", path, "--data", sets, "--json")) for path in (half, rounded))
    assert values(first["scores"]) == values(second["scores"])


def test_bad_sets_are_skipped_with_the_reason_and_the_good_ones_scored(
    models: dict[str, Path], sets: Path, tmp_path: Path
) -> None:
    root = tmp_path / "mixed"
    root.mkdir()
    (root / "good").symlink_to(sets / "photos-captions")
    (root / "notes").mkdir()
    picture = Image.new("RGB", (8, 8))
    for name in ("average", "unreadable", "untemplated"):
        evalset_write.write_classification(root / name, [(picture, 0)], ("a", "b"), ("{c}",))
    (root / "untemplated" / "zeroshot_classification_templates.txt").write_text("a photo\n")
    shard = root / "unreadable" / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"IHDX"))
    table = command("evaluate", models["ours"], "--data", root, "--suite", "zero-shot,linear-probe")
    lines = re.findall(r"skipped: ([^:]+): (.*)", table)
    assert len({why for _, why in lines}) == len(lines)
    assert {name: why[:18] for names, why in lines for name in names.split(", ")} == {
        "zero-shot/notes": "evaluation set not",
        "linear-probe/notes": "it has no train sp",
        "zero-shot/untemplated": "evaluation set unt",
        "linear-probe/untemplated": "it has no train sp",
        "linear-probe/average": "it has no train sp",
        "linear-probe/good": "it has captions, n",
        "linear-probe/unreadable": "it has no train sp",
        "zero-shot/average": "a set must not be ",
        "zero-shot/unreadable": "evaluation set unr",
    }
    assert "image_retrieval_recall@1" in table
    with pytest.raises(UserError, match=r"unreadable: test/0.tar: 0-00000000: its \.png is no image that can be read"):
        command("evaluate", models["ours"], "--data", root / "unreadable")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a run of an upcycled model."""
    plan = make_plan(REGISTRY, "sparse-upcycling", load_protocol(REGISTRY.protocols["smoke"].target, QUICK))
    path = run(plan, tmp_path_factory.mktemp("results"), Reporter())
    assert path is not None
    return path


def test_a_record_and_its_weights_get_the_scores_of_the_record(made: Path) -> None:
    there = record.read(made)
    path = cache_root() / "weights" / f"{there.hashes.weights}.safetensors"
    for given in ((made,), (path, "--protocol", "smoke")):
        facts = json.loads(command("evaluate", *given, "--json"))
        assert values(facts["scores"]) == values(there.scores)
        assert facts["suite_fingerprints"] == there.protocol.suite_fingerprints
        assert (facts["protocol"], facts["sha256"], facts["skipped"]) == ("smoke", there.hashes.weights, {})
        assert [score["headline"] for score in facts["scores"]] == [score.headline for score in there.scores]


def test_a_protocol_that_was_not_given_is_said_before_its_data_are_built(
    models: dict[str, Path], made: Path, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        with contextlib.suppress(UserError):  # of the lab
            app([str(argument) for argument in ("evaluate", *arguments, "--json")], standalone_mode=False)
        lines = capsys.readouterr().err.splitlines()
        return next((line for line in lines if line.startswith("protocol ")), "")

    default = f"protocol lab: the default, since {models['ours']} does not say how it was trained; --protocol names"
    assert said(models["ours"]).startswith(default)
    assert said(made).startswith("protocol smoke: the record's; --protocol names another")
    assert said(made, "--protocol", "smoke") == said(models["ours"], "--data", sets) == ""


def test_a_suite_that_breaks_when_no_other_is_left_is_one_line(
    models: dict[str, Path], sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of a\nplugin")

    monkeypatch.setattr(REGISTRY.suites["zero-shot"].target, "evaluate", broken)
    with pytest.raises(UserError, match="no suite could run: ZeroDivisionError: of a plugin"):
        command("evaluate", models["ours"], "--data", sets)


def test_a_protocols_suites_on_a_users_folder(made: Path, sets: Path) -> None:
    with pytest.raises(UserError, match="evaluation set not found: digits-test, digits-retrieval"):
        command("evaluate", made, "--protocol", "smoke", "--data", sets)


def test_weights_that_the_cache_lacks_are_said(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = record.read(made).hashes.weights
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=rf"weights are not in this machine's cache \(.*{digest}.*copy them") as caught:
        command("evaluate", made)
    assert "\n" not in str(caught.value)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / f"{digest}.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="is not what its name says"):
        command("evaluate", made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt"], "no such file"),
        (["{plain}"], "say with --model"),
        (["{plain}", "--model", "smoke-vti"], "did you mean 'smoke-vit'"),
        (["{ours}", "--model", "smoke-vit"], "leave out --model"),
        (["{ours}", "--protocol", "clip-b32"], "give --data"),
        (["{ours}", "--data", "{empty}"], "holds none"),
        (["{ours}", "--data", "{empty}/nowhere"], "no such folder"),
        (["{ours}", "--protocol", "smoke", "--suite", "other"], "unknown suite 'other'"),
        (["{ours}", "--data", "{sets}", "--suite", "other"], "unknown suite 'other'"),
        (["nowhere.pt", "--suite", "other"], "unknown suite 'other'"),  # before anything is loaded
        (["{ours}", "--data", "{sets}/photos-captions", "--suite", "few-shot"], "nothing can be scored"),
        (["{ours}"], "the lab was asked for"),
        (["{ours}", "--data", "{sets}", "--output", "{empty}/a/b.json"], "is not a folder"),
    ],
)
def test_bad_input_is_one_line(
    models: dict[str, Path], sets: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {**models, "empty": tmp_path, "sets": sets}
    with pytest.raises(UserError, match=message) as caught:
        command("evaluate", *(argument.format(**places) for argument in arguments))
    assert "\n" not in str(caught.value)
