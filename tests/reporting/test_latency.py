"""Latency: the timed calls compute what evaluation does, models take turns, and the command compares them."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers import tiny_clip, tiny_moe, upcycled
from tests.moe_helpers import relative_error
from upcycle_bench.cli import app
from upcycle_bench.model import weights
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.reporting import latency
from upcycle_bench.util.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dense model and its copy with experts."""
    folder, dense = tmp_path_factory.mktemp("weights"), tiny_clip()
    sparse = upcycled(load_registry().strategies["sparse-upcycling"].target(), dense, seed=0)
    return [folder / f"{weights.save(clip, tiny_moe(), folder)}.safetensors" for clip in (dense, sparse)]


def test_calls_take_turns_and_two_of_three_warm_up() -> None:
    order: list[str] = []
    now = 0.0

    def call(name: str, seconds: list[float]) -> None:
        nonlocal now
        now += seconds[order.count(name) // 3] if order.count(name) % 3 == 2 else 99.0
        order.append(name)

    first, second = [1.0, 5.0, 2.0], [4.0, 4.0, 40.0]
    calls = [lambda: call("a", first), lambda: call("b", second)]
    assert latency.in_turns(calls, 3, clock=lambda: now) == [2.0, 4.0]
    assert "".join(order) == "aaabbb" * 3


def test_what_is_timed_is_what_evaluation_computes(files: list[Path]) -> None:
    for clip in map(weights.load, files):
        images_BC = latency.image_encoder(clip, clip.model, 3)()
        texts_BC = latency.text_encoder(clip, clip.model, 3)()
        assert not images_BC.requires_grad and not texts_BC.requires_grad
        with torch.no_grad():
            prompts = clip.tokenize([f"a picture of thing number {number}" for number in range(3)])
            assert relative_error(texts_BC, clip.model.encode_text(prompts)) < 1e-5
            one_BC = latency.image_encoder(clip, clip.model, 1)()
        assert images_BC.shape == texts_BC.shape and one_BC.shape == (1, images_BC.shape[1])
        assert relative_error(images_BC[0], images_BC[1]) > 1e-3  # different images


def test_the_command(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "BATCH", 4)
    before = torch.get_num_threads()
    arguments = ["latency", *map(str, files), "--repeats", "1", "--threads", "1"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (found["device"], found["threads"]) == ("cpu", 1) and torch.get_num_threads() == before
    dense, sparse = found["models"]
    assert [dense["file"], sparse["file"]] == [str(path) for path in files]
    assert dense["parameters_total"] == dense["parameters_active"] < sparse["parameters_active"]
    assert sparse["parameters_active"] < sparse["parameters_total"]
    keys = ("image_ms", "text_ms", "images_per_second", "texts_per_second")
    assert all(model[key] > 0 for model in (dense, sparse) for key in keys)
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}).stdout
    assert all(path.stem[:16] in shown for path in files) and "images/s" in shown


def test_a_file_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    error = CliRunner().invoke(app, ["latency", str(tmp_path / "a.safetensors")]).exception
    assert isinstance(error, UserError) and "is no checkpoint that is known here" in str(error)
