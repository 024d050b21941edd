"""Figures show the numbers of the records and their metrics; errors are one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.records import make_record
from upcycle_bench import cli, record
from upcycle_bench.reporting.figures import draw, read_runs
from upcycle_bench.util.errors import UserError

LAYERS = ("vision.1", "vision.3", "text.1")


def layer(value: float) -> dict[str, Any]:
    return {
        "load": [0.25, 0.75],
        "router_entropy": value,
        "routing_probability": [0.5, None],
        "expert_cosine": value / 10,
        "relative_compactness": None,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense run and two seeds of an upcycled one, whose entropies tell step, layer and seed."""
    drift = {"layers": {name: {"function_drift": 0.1} for name in LAYERS}}
    for label, seed in (("dense", 0), ("sparse-upcycling", 0), ("sparse-upcycling", 1)):
        moe = label != "dense"
        made = make_record(label, seed, seed, receipt=drift if moe else {}, diagnostics=drift if moe else {})
        path = record.write(made, {"a": np.zeros(2)}, tmp_path)
        rows: list[dict[str, Any]] = [{"step": step, "contrastive": 3.0 - step / 10} for step in (1, 5)]
        for row in rows if moe else ():
            row["layers"] = {name: layer(row["step"] + place + 100 * seed) for place, name in enumerate(LAYERS)}
        path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def curves(axes: Any) -> list[list[tuple[float, float]]]:
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.lines]


@pytest.mark.parametrize("name", ["loss", "similarity", "entropy", "utilisation", "probability", "drift"])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_every_figure_in_every_format(folder: Path, name: Any, ending: str) -> None:
    output = folder / f"figure.{ending}"
    records = draw(read_runs([folder]), name, output)
    assert len(records) == (3 if name == "loss" else 2)
    head = output.read_bytes()
    assert not list(folder.glob(".*"))
    assert head.startswith(b"\x89PNG") if ending == "png" else b"<svg" in head


def test_entropy_is_that_of_the_metrics(folder: Path, drawn: list[Figure]) -> None:
    draw(read_runs([folder]), "entropy", folder / "figure.png")
    vision, text, vision_depth, text_depth = drawn[0].axes
    assert curves(vision) == [[(1, 1.5), (5, 5.5)], [(1, 101.5), (5, 105.5)]]  # the mean of layers 1 and 3
    assert curves(text) == [[(1, 3), (5, 7)], [(1, 103), (5, 107)]]
    assert curves(vision_depth) == [[(1, 5), (3, 6)], [(1, 105), (3, 106)]]  # block by block, at the last step
    assert curves(text_depth) == [[(1, 7)], [(1, 107)]]
    assert len({line.get_color() for line in vision.lines}) == 1  # two seeds of one strategy
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["sparse-upcycling"]


def test_experts_stand_by_rank_and_unused_ones_have_no_probability(folder: Path, drawn: list[Figure]) -> None:
    draw(read_runs([folder]), "utilisation", folder / "figure.png")
    draw(read_runs([folder]), "probability", folder / "figure.png")
    load, probability = (figure.axes[: len(LAYERS)] for figure in drawn)
    assert [axes.get_title() for axes in load] == list(LAYERS)
    assert curves(load[0]) == [[(1, 0.75), (2, 0.25)]] * 2
    assert curves(probability[0]) == [[(1, 0.5)]] * 2


def test_a_label_is_no_mathematics(tmp_path: Path, drawn: list[Figure]) -> None:
    path = record.write(make_record(r"$\frac$"), None, tmp_path)
    path.with_suffix(".jsonl").write_text('{"step": 1, "contrastive": 3.0}\n')
    draw(read_runs([path]), "loss", tmp_path / "figure.svg")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [r"$\frac$"]


def test_errors_are_one_line(folder: Path) -> None:
    runs = read_runs([folder])
    for name, output, words in (
        ("entropy", "figure.doc", "end it in .png, .svg or .pdf"),
        ("compactness", "figure.png", "none of 3 runs has what it shows"),
    ):
        with pytest.raises(UserError, match=words) as error:
            draw(runs, name, folder / output)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    assert not list(folder.glob("figure*"))
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no successful run at"):
        read_runs([folder / "empty"])


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "loss.pdf"
    for more, last in (((), f"{output}: loss of 3 runs\n"), (("--json",), None)):
        arguments = ["upcycle-bench", "plot", str(folder), "--figure", "loss", "--output", str(output), *more]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as leave:
            cli.main()
        out = capsys.readouterr().out
        assert leave.value.code == 0
        assert out == last if last else len(json.loads(out)["records"]) == 3
    assert output.read_bytes().startswith(b"%PDF")
