"""DeRS compression: unbiased, the identity at p = 0 and full bits, sizes by the paper's formulas."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.helpers import tiny_clip, tiny_moe, upcycled
from upcycle_bench import record
from upcycle_bench.cli import app
from upcycle_bench.model import weights
from upcycle_bench.model.compress import Quantise, Sparsify, compress
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

MATRIX = 64 * 256  # of smoke-vit's FFNs
STREAM = Stream(("test", 0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of four experts that have learnt something, and the dense weights."""
    folder = tmp_path_factory.mktemp("weights")
    clip = tiny_clip()
    save_file(clip.model.state_dict(), folder / "dense.safetensors")
    made = upcycled(load_registry().strategies["sparse-upcycling"].target(), clip, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in moe_layers(made.model).values():
            for parameter in layer.experts.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return folder / f"{weights.save(made, tiny_moe(), folder)}.safetensors", folder / "dense.safetensors"


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


# ---- R6 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Sparsify(0.0), Quantise(32)])
def test_r6_nothing_dropped_or_full_bits_is_the_identity(files: tuple[Path, Path], tmp_path: Path, method: Any) -> None:
    report = compress(*files, method, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == files[0].read_bytes()
    assert report["relative_error_of_deltas"] == 0
    assert f"{report['sha256']}.safetensors" == files[0].name


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_r6_dare_is_unbiased(rate: float) -> None:
    """200 draws of 400 entries: means have the standard error |d| sqrt(p / (1 - p) / 200); six of these at most."""
    delta = normal(20, 20)
    draws = np.stack([Sparsify(rate).apply(delta, STREAM.child(number)) for number in range(200)])
    z = (draws.mean(0) - delta) / (np.abs(delta) * math.sqrt(rate / (1 - rate) / 200))
    assert np.abs(z).max() < 6
    assert abs(z.std() - 1) < 0.2
    kept = draws != 0
    np.testing.assert_allclose(draws[kept], np.broadcast_to(delta / (1 - rate), draws.shape)[kept])
    assert abs(kept.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / kept.size)


# ---- Quantisation -------------------------------------------------------------------------------------------------


def test_few_bits_come_near_the_best_uniform_quantiser_of_a_normal() -> None:
    """Squared errors of the optimal uniform quantiser (Max 1960): 0.3634, 0.1188, 0.0374, 0.0115 of the variance."""
    delta = normal(200, 200)
    for bits, best in ((1, 0.3634), (2, 0.1188), (3, 0.0374), (4, 0.0115)):
        cheap = Quantise(bits).apply(delta, STREAM)
        assert len(np.unique(cheap)) == 2**bits
        assert np.square(cheap - delta).mean() == pytest.approx(best, rel=0.05)


def test_one_bit_is_sign_times_mean_magnitude() -> None:
    delta = normal(30, 30)
    np.testing.assert_allclose(Quantise(1).apply(delta, STREAM), np.sign(delta) * np.abs(delta).mean(), rtol=1e-12)


def test_many_bits_lose_little_even_with_outliers() -> None:
    delta = normal(50, 50)
    delta[0, 0] = 100
    assert np.abs(Quantise(16).apply(delta, STREAM) - delta).max() < 1.01 * 100 / (2**16 - 1)
    errors = [np.square(Quantise(bits).apply(delta, STREAM) - delta).sum() for bits in range(1, 17)]
    assert all(finer < coarser for coarser, finer in itertools.pairwise(errors))
    assert not Quantise(2).apply(np.zeros((2, 2)), STREAM).any()


# ---- Files, sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "numbers"), [
    (Sparsify(0.9), 1 + 4 * 0.1),  # 1 + E (1 - p) numbers of 32 bits
    (Quantise(2), (32 + 4 * 2) / 32),  # 32 + E k bits
])  # fmt: skip
def test_sizes_and_what_changes(files: tuple[Path, Path], tmp_path: Path, method: Any, numbers: float) -> None:
    report = compress(*files, method, tmp_path / "out.safetensors")
    assert report["expert_matrix_bytes"] == 3 * 2 * 4 * MATRIX * 4  # layers, matrices, experts, bytes
    assert report["compressed_bytes"] == round(3 * 2 * MATRIX * 4 * numbers)
    assert report["ratio"] == pytest.approx(4 / numbers)
    before, after = load_file(files[0]), load_file(tmp_path / "out.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if ".deepspeed_experts." in key and key.endswith("weight")}
    loaded = weights.load(tmp_path / "out.safetensors")
    assert len(moe_layers(loaded.model)) == 3
    if isinstance(method, Sparsify):  # a dropped difference leaves the dense weight
        dense = load_file(files[1])["transformer.resblocks.1.mlp.c_fc.weight"]
        experts = moe_layers(loaded.model)["text.1"].experts
        share = [float((expert.c_fc.weight == dense).float().mean()) for expert in experts]  # type: ignore[union-attr]
        assert all(abs(each - 0.9) < 5 * math.sqrt(0.09 / MATRIX) for each in share)
        assert len(set(share)) > 1
    again = compress(*files, method, tmp_path / "again.safetensors")
    assert again["sha256"] == report["sha256"]
    if isinstance(method, Sparsify):
        assert compress(*files, method, tmp_path / "other.safetensors", seed=1)["sha256"] != report["sha256"]


def test_bad_input_is_one_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    dense = tmp_path / f"{weights.save(tiny_clip(), tiny_moe(), tmp_path)}.safetensors"
    output = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match="a dense model has no experts"):
        compress(dense, files[1], Sparsify(0.5), output)
    with pytest.raises(UserError, match="is already upcycled"):
        compress(files[0], files[0], Sparsify(0.5), output)
    small = upcycled(load_registry().strategies["virtual-group"].target(), tiny_clip(), 0, tiny_moe(experts=2))
    moe = tiny_moe(experts=4, top_k=4)
    small_experts = tmp_path / f"{weights.save(small, moe, tmp_path)}.safetensors"
    with pytest.raises(UserError, match="only experts of the dense FFN's size"):
        compress(small_experts, files[1], Sparsify(0.5), output)
    assert not output.exists()
    for rate in (-0.1, 1.0, math.nan):
        with pytest.raises(UserError, match="--rate"):
            Sparsify(rate)
    for bits in (0, 17, 33):
        with pytest.raises(UserError, match="--bits"):
            Quantise(bits)
    assert set(tmp_path.iterdir()) == {dense, small_experts}


def test_the_command(files: tuple[Path, Path], tmp_path: Path) -> None:
    output = str(tmp_path / "out.safetensors")
    arguments = ["compress", str(files[0]), "--base", str(files[1]), "--method", "quantise", "--output", output]
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert report["method"] == {"name": "quantise", "bits_per_weight": 2}
    assert report["output"] == output
    with pytest.raises(UserError, match=r"--output .*there is such a file; --force replaces it"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    printed = CliRunner().invoke(app, [*arguments, "--force"], catch_exceptions=False).stdout
    # 24 matrices of 65,536 bytes; 40 of 128 bits remain.
    assert printed.splitlines()[0] == "experts' matrices: 1.57 MB -> 0.49 MB, 3.20 times smaller"
    assert weights.load(tmp_path / "out.safetensors").name == "smoke-vit"
    with pytest.raises(UserError, match="--output"):
        CliRunner().invoke(app, [*arguments[:-1], "out.pt"], catch_exceptions=False)


def test_the_command_takes_a_record(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(hashes=SimpleNamespace(weights="a digest"))
    monkeypatch.setattr(record, "read", lambda path: {"run.json": found}[path.name])
    monkeypatch.setattr(weights, "of_record", lambda path, digest: {"a digest": files[0]}[digest])
    output = ["--output", str(tmp_path / "out.safetensors")]
    arguments = ["compress", "run.json", "--base", str(files[1]), "--method", "quantise", *output]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert weights.load(tmp_path / "out.safetensors").name == "smoke-vit"
