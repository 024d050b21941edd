"""The critical-difference diagram draws the numbers of its ranking, whatever strategies are called."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.records import make_record
from tests.reporting.test_leaderboard import runs, two_headlines
from upcycle_bench import cli, record
from upcycle_bench.reporting.comparable import counting_runs
from upcycle_bench.reporting.critical_difference import Ranking, rankings
from upcycle_bench.reporting.figures import draw, read_runs
from upcycle_bench.reporting.rank_figure import LETTERS, draw_rankings, short_names
from upcycle_bench.util.errors import UserError

HOSTILE = [
    "a|b",
    r"$\frac$",
    "x_{y}^",
    "<script>&amp;",
    "{label} {0}",
    "l" * 200,
    "l" * 201,
    "two\nlines",
    "日本語",
    "\x1b[31mred\0",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Strategies with names that mean something to others, three seeds each, and one that has a single seed."""
    made = [
        run
        for place, label in enumerate(HOSTILE)
        for run in runs(
            label, {seed: place + (seed == 1) * 1.5 * (place % 2) for seed in range(3)}, strategy={"name": label}
        )
    ]
    for number, run in enumerate([*made, make_record("few")]):
        record.write(run, None, tmp_path / str(number))
    return tmp_path


@pytest.mark.filterwarnings("ignore:Glyph")  # a font without the signs of a name
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_any_name_in_every_format(folder: Path, ending: str) -> None:
    output = folder / f"figure.{ending}"
    shown = draw(read_runs([folder]), "critical-difference", output)
    assert len(shown) == 3 * len(HOSTILE) and not any("few" in path.name for path in shown)
    assert output.stat().st_size > 5000


@pytest.mark.filterwarnings("ignore:Glyph")
def test_it_shows_the_numbers(folder: Path) -> None:
    found = [run.record for run in read_runs([folder])]
    figure = Figure()
    draw_rankings(figure, found)
    ranking = rankings(counting_runs(found))["in-distribution"]
    assert isinstance(ranking, Ranking)
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    for label, rank in ranking.ranks.items():
        name = short_names(ranking.ranks, LETTERS)[label]
        assert any(text in (f"{name} ({rank:.2f})", f"({rank:.2f}) {name}") for text in texts), label
    assert sorted(mark.get_offsets()[0][0] for mark in axes.collections) == pytest.approx([*ranking.ranks.values()])
    ends = [sorted(line.get_xdata()) for line in axes.lines]
    for group in ranking.groups:
        assert sorted(ranking.ranks[label] for label in group) in ends
    assert [1.0, 1 + ranking.distance] in ends
    assert " ".join(texts[-1].split()) == ranking.said()


def test_what_cannot_be_drawn_is_said_beside_what_can(tmp_path: Path) -> None:
    three = {0: 1.0, 1: 2.0, 2: 3.0}
    made = [run for label in "abc" for run in two_headlines(label, three, three)]
    made += runs("alone", three, protocol={"name": "other"})
    for number, run in enumerate(made):
        record.write(run, None, tmp_path / str(number))
    figure = Figure()
    assert len(draw_rankings(figure, [run.record for run in read_runs([tmp_path])])) == 9
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["other, in-distribution", "smoke, in-distribution", "smoke, shift"]
    assert "needs 3 strategies" in figure.axes[0].texts[0].get_text()


def test_nothing_to_draw_is_one_line(tmp_path: Path) -> None:
    path = record.write(make_record(), None, tmp_path)
    with pytest.raises(
        UserError, match="--figure critical-difference: in-distribution: a critical-difference"
    ) as raised:
        draw(read_runs([path]), "critical-difference", tmp_path / "figure.png")
    assert "\n" not in str(raised.value) and not (tmp_path / "figure.png").exists()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "ranks.svg"
    arguments = ["upcycle-bench", "plot", str(folder), "-f", "critical-difference", "--output", str(output), "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 0 and len(json.loads(capsys.readouterr().out)["records"]) == 3 * len(HOSTILE)
    assert "<svg" in output.read_text()
