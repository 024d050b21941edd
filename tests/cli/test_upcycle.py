"""`upcycle-bench upcycle`: one file that loads, one-line errors before any work, nothing half-written."""

import io
import json
import os
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from rich.console import Console

import upcycle_bench
from tests.cli.test_main import call
from tests.helpers import MODEL, equal, tiny_batches, tiny_clip
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model import hub
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.pretrained import find_pretrained
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.upcycling.from_checkpoint import choose_strategy, moe_settings
from upcycle_bench.upcycling.initialise import make_experts
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.log_lines import STAMP
from upcycle_bench.util.progress import TerminalReporter
from upcycle_bench.util.rng import Stream

PHASES = ["load", "calibrate", "experts", "compare", "write"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    safetensors.torch.save_file(tiny_clip().model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def shards() -> tuple[Path, ...]:
    return load_world("digits", 0).train_shards


def command(dense: Path, output: Path, *more: str) -> list[str]:
    return ["upcycle", "-m", MODEL, "--pretrained", str(dense), "--output", str(output), *more]


def test_cluster_aware_is_what_a_run_would_train(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    dense: Path,
    shards: tuple[Path, ...],
) -> None:
    """The experts equal those that `run` makes with this seed; --json has the facts."""
    output = tmp_path / "moe.safetensors"
    options = [
        "--calibration",
        str(shards[0].parent),
        "--seed",
        "3",
        "--experts",
        "4",
        "-o",
        "pairs=300",
        "-o",
        "tau=.8",
    ]
    assert call(monkeypatch, *command(dense, output, *options, "--json")) == 0
    captured = capsys.readouterr()
    facts: dict[str, Any] = json.loads(captured.out)
    assert "warning" not in captured.err

    clip = create_clip(MODEL, dense)
    clip.model.eval()
    pairs, sample = PairDataset(shards, clip, captions="text"), Stream(("calibration", 3))
    strategy, moe = choose_strategy("cluster-aware", {"pairs": 300, "tau": 0.8}), moe_settings(experts=4)
    inits = make_experts(
        strategy,
        clip.model,
        moe,
        3,
        lambda wanted: ((clip.normalise(b.images), b.texts) for b in pairs.calibration(sample, wanted, 256)),
    )
    loaded = upcycle_bench.load(output).model
    assert equal(loaded.state_dict(), put_experts(clip.model, inits, moe).state_dict())

    assert list(facts["layers"]) == list(moe_layers(loaded)) == list(inits)
    assert all(0 < layer["function_drift"] < 1 and "mean_rank" in layer for layer in facts["layers"].values())
    assert list(facts["phases"]) == PHASES
    assert all(phase["seconds"] > 0 and phase["peak_memory_bytes"] > 0 for phase in facts["phases"].values())
    assert facts["parameters_total"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert facts["parameters_dense"] < facts["parameters_active"] < facts["parameters_total"]
    assert facts["options"]["tau"] == 0.8 and facts["seed"] == 3 and facts["bytes"] == output.stat().st_size
    assert os.listdir(tmp_path) == [output.name]


def test_a_single_choice_prints_the_drift_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dense: Path
) -> None:
    drifts = []
    for top_k in ("1", "2"):
        more = ["-s", "sparse-upcycling", "--top-k", top_k, "--force", "--json"]
        assert call(monkeypatch, *command(dense, tmp_path / "moe.safetensors", *more)) == 0
        captured = capsys.readouterr()
        drifts.append([layer["function_drift"] for layer in json.loads(captured.out)["layers"].values()])
        warned = [line for line in captured.err.splitlines() if line.startswith("warning: top_k=1: ")]
        assert len(warned) == (top_k == "1")
    assert min(drifts[0]) > 0.3 and max(drifts[1]) < 1e-5


def test_without_calibration_and_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dense: Path
) -> None:
    output = tmp_path / "moe.safetensors"
    assert call(monkeypatch, *command(dense, output, "-s", "sparse-upcycling", "--every", "1", "--offset", "0")) == 0
    out = capsys.readouterr().out
    layers = moe_layers(upcycle_bench.load(output).model)
    rows = {
        line.split()[0]: line.split()[1] for line in out.splitlines() if line.strip().startswith(("vision", "text"))
    }
    assert rows == dict.fromkeys(layers, "0.0000")  # a copy preserves the function
    for text in ("image 1.0000, text 1.0000", "on random inputs", "parameters, ", "load ", "write ", "peak memory "):
        assert text in out
    inputs = tiny_batches(tiny_clip(), pairs=4)[0]
    model, before = upcycle_bench.load(output).model, tiny_clip().model
    assert torch.allclose(model.encode_image(inputs[0]), before.encode_image(inputs[0]), atol=1e-5)


def test_an_existing_file_is_kept_unless_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dense: Path
) -> None:
    output = tmp_path / "moe.safetensors"
    output.write_text("precious")
    arguments = command(dense, output, "-s", "drop-upcycling")
    assert call(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err == f"error: --output {output}: there is such a file; --force replaces it.\n"
    assert output.read_text() == "precious"
    assert call(monkeypatch, *arguments, "--force") == 0
    assert len(moe_layers(upcycle_bench.load(output).model)) >= 2


def test_too_few_pairs_are_a_warning_that_counts_them(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    dense: Path,
    shards: tuple[Path, ...],
) -> None:
    number = len(PairDataset(shards, tiny_clip()))
    arguments = command(dense, tmp_path / "moe.safetensors", "--calibration", str(shards[0].parent), "-o", "pairs=9999")
    assert call(monkeypatch, *arguments) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert lines == [
        f"warning: cluster-aware asks for 9,999 calibration pairs and saw {number:,}; its statistics rest on these."
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "cluster-aware calibrates on 131,072 image-text pairs: give --calibration"),
        (["--calibration", "no-{0..1}.tar"], "--calibration no-{0..1}.tar: no such file: no-0.tar"),
        (["-s", "sparse"], "unknown strategy 'sparse': did you mean"),
        (["-s", "dense-frozen"], "dense-frozen leaves the model dense"),
        (["-o", "tau=2"], "cluster-aware: tau: Input should be less than or equal to 1"),
        (["-o", "taau=1"], "unknown option of cluster-aware 'taau': did you mean 'tau'"),
        (["-o", "tau"], "write it as KEY=VALUE"),
        (["-s", "sparse-upcycling", "--top-k", "9"], "top_k (9) exceeds experts (8)"),
        (["-s", "sparse-upcycling", "--offset", "90"], "moe.offset=90 leaves no block to replace"),
        (["-s", "sparse-upcycling", "-m", "ViT-B32"], "unknown open_clip model 'ViT-B32': did you mean 'ViT-B-32'"),
        (
            ["-s", "sparse-upcycling", "--pretrained", "no.pt"],
            "no.pt: no such file; give one with weights of smoke-vit",
        ),
        (["-s", "sparse-upcycling", "--pretrained", "text"], "text is no checkpoint that is known here"),
        (["--output", "model.pt"], "give a file name that ends in .safetensors"),
        (["--output", "no/moe.safetensors"], "no is not a folder; make it"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    dense: Path,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no state dict")
    assert call(monkeypatch, *command(dense, Path("moe.safetensors"), *more)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not STAMP.match(line)]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert captured.out == ""
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("culprit", ["make_experts", "diagnose", "save"])
def test_an_interruption_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dense: Path, culprit: str
) -> None:
    def interrupted(*arguments: Any, **more: Any) -> None:
        if culprit == "save":
            Path(arguments[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    place = "safetensors.torch.save_file" if culprit == "save" else f"upcycle_bench.upcycling.from_checkpoint.{culprit}"
    monkeypatch.setattr(place, interrupted)
    assert call(monkeypatch, *command(dense, tmp_path / "moe.safetensors", "-s", "sparse-upcycling")) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("interrupted: nothing was written\n")
    assert os.listdir(tmp_path) == []


def test_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dense: Path
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert call(monkeypatch, *command(dense, tmp_path / "moe.safetensors")) == 2
    assert capsys.readouterr().err == "error: upcycle is the work of one process; start it without torchrun.\n"


# ---- pretrained tags -------------------------------------------------------------------------------------------------


@pytest.fixture
def tag(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tag of our model in open_clip's table."""
    settings: dict[str, Any] = {"hf_hub": "someone/model/", "mean": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, MODEL, {"a_tag": settings})
    return settings


def test_a_tag_brings_its_weights_and_its_transform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dense: Path, tag: dict[str, Any]
) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda found: str(dense) if found is tag else "")
    output = tmp_path / "moe.safetensors"
    arguments = ["upcycle", "-m", MODEL, "--pretrained", "a_tag", "--output", str(output), "-s", "sparse-upcycling"]
    assert call(monkeypatch, *arguments) == 0
    clip = upcycle_bench.load(output)
    assert torch.equal(clip.model.visual.proj, tiny_clip().model.visual.proj)
    assert clip.mean == (0.5, 0.5, 0.5) and clip.model.visual.preprocess_cfg["resize_mode"] == "squash"


def test_a_tag_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, tag: dict[str, Any]) -> None:
    def unreachable(*arguments: Any, **more: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", unreachable)
    monkeypatch.setattr(hub, "unreachable", lambda url: None)  # the host answers, then the way is lost
    with pytest.raises(UserError, match=r"cannot fetch the a_tag weights of smoke-vit .*no route to host") as raised:
        find_pretrained(MODEL, "a_tag")
    assert "\n" not in str(raised.value) and str(raised.value).endswith("or give the file.")
    assert "run `hf download someone/model` where there is a network" in str(raised.value)


def test_a_tag_of_another_activation_names_the_right_model() -> None:
    with pytest.raises(
        UserError, match=r"openai weights were trained with another activation .* choose ViT-B-32-quickgelu"
    ):
        find_pretrained("ViT-B-32", "openai")
    with pytest.raises(UserError, match="did you mean 'laion2b_s34b_b79k'"):
        find_pretrained("ViT-B-32", "laion2b_s34b_b79")


def test_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dense: Path, shards: tuple[Path, ...]
) -> None:
    """rich allows one display at a time."""
    reporter = TerminalReporter()
    reporter.console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr("upcycle_bench.cli.upcycle.terminal_reporter", lambda: reporter)
    more = ["--calibration", str(shards[0].parent), "-o", "pairs=100"]
    assert call(monkeypatch, *command(dense, tmp_path / "moe.safetensors", *more)) == 0
    shown = reporter.console.file.getvalue()  # type: ignore[attr-defined]
    assert "calibrating" in shown
    assert shown.count("done") == 5  # loading, making experts, comparing, writing
