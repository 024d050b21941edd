"""`make scaling`: laws are recovered from points that follow them, the work grows as it should, files are whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.bench import scaling
from tests.bench.floor import Rates
from tests.bench.rows import Settings
from tests.bench.scaling import Curve, experiments
from tests.bench.timing import Sample

RATES = Rates({"fp32": 1.0, "bf16": 1.0, "fp64": 1.0}, 1.0)  # floors are then FLOPs
X = (1.0, 2.0, 4.0, 8.0)


def curve(growth: scaling.Growth, wall: tuple[float, ...]) -> Curve:
    return Curve(name="a", what="b", variable="S", growth=growth, x=X, wall=wall, cpu=wall, floor=(0.1,) * 4)


def test_laws_are_recovered() -> None:
    power = curve("power", tuple(3 * x**1.5 for x in X))
    assert power.fit() == pytest.approx((3, 1.5))
    assert power.statement() == "time ~ S^1.50"
    line = curve("linear", tuple(0.5 + 0.25 * x for x in X))
    assert line.fit() == pytest.approx((0.5, 0.25))
    assert line.statement() == "time ~ 0.5 s + 2 s * S / 8"  # 2 s: what S adds at the last point
    assert curve("linear", tuple(9 - x for x in X)).statement() == "time ~ 9 s - 8 s * S / 8"
    for each in (power, line):
        assert each.fitted(torch.tensor(X).double().numpy()) == pytest.approx(each.wall)


def test_a_line_is_fitted_to_relative_errors() -> None:
    """Ten per cent too much at the last point moves the fit there by less than ten per cent, and hardly elsewhere."""
    wall = [1.0 + x for x in X]
    found = curve("linear", (*wall[:3], 1.1 * wall[3])).fitted(torch.tensor(X).double().numpy())
    assert all(abs(ours / true - 1) < 0.06 for ours, true in zip(found[:3], wall[:3], strict=True))


def test_the_work_grows_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs of two points of each experiment, a thirty-second of their size; nothing is timed."""
    monkeypatch.setattr(scaling, "interleave", lambda steps, rounds, shortest: [[Sample(1.0, 2.0)]] * len(steps))
    found = {}
    for experiment in experiments(smaller=32):
        ends = (experiment.x[0], experiment.x[-1])
        made = scaling.measure(replace(experiment, x=ends), Settings(rounds=1, threads=1), RATES)
        assert (made.x, made.wall, made.cpu) == (ends, (1.0, 1.0), (2.0, 2.0))
        found[made.name] = made.floor[1] / made.floor[0]
    assert found["tokens"] == 8192 / 512
    assert 1 < found["experts"] < 1.2  # only the router's: 32 rows instead of 2, of width 8
    # D^2 from 4 to 32, with a router that grows by D.
    assert 0.8 * 64 < found["width"] <= 64
    assert 3 < found["calibration"] <= 8  # beside the stream, clusters are fitted to a fixed sample
    assert 1 < found["classes"] < 64  # 32 images are encoded in any case
    assert list(found) == ["tokens", "experts", "width", "calibration", "classes"]


def test_what_is_written(tmp_path: Path) -> None:
    document = tmp_path / "docs" / "performance.md"
    document.parent.mkdir()
    document.write_text(
        "before\n<!-- measured: scaling -->\nold\n<!-- end -->\n<!-- measured: bench -->\nx\n<!-- end -->\n"
    )
    made = curve("power", (3.0, 6.0, 12.0, 24.0))
    scaling.write([made], "A machine.", tmp_path)
    assert Curve(**{k: tuple(v) if isinstance(v, list) else v for k, v in _only(tmp_path).items()}) == made
    picture = (tmp_path / "docs" / "figures" / "scaling-a.svg").read_text()
    assert "<svg" in picture and "Date" not in picture
    text = document.read_text()
    assert "| b | S = 1, 2, 4, 8 | time ~ S^1.00 | 3 to 24 | 0.1 to 0.1 |" in text and "A machine." in text
    assert "![b](figures/scaling-a.svg)" in text and "old" not in text
    assert text.endswith("<!-- measured: bench -->\nx\n<!-- end -->\n")
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


def _only(root: Path) -> dict[str, object]:
    (found,) = json.loads((root / "tests" / "bench" / "scaling.json").read_text())
    return found


def test_the_document_has_a_place_for_it() -> None:
    assert "<!-- measured: scaling -->" in (scaling.ROOT / "docs" / "performance.md").read_text()
