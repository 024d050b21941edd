"""Leaderboards in four formats: the same rows, nothing cut off, and notes on the numbers."""

import csv
import io
import json
import re
from typing import Any

import pytest

from tests.records import headlines_of, make_record, score
from tests.reporting.test_leaderboard import failure, runs, two_headlines
from upcycle_bench.reporting.board import Board
from upcycle_bench.reporting.captions import NOTES
from upcycle_bench.reporting.formats import render
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.util.errors import UserError

OPEN = {"division": "open", "overrides": ("moe.experts=4",), "training_fingerprint": "of 4 experts"}


@pytest.fixture
def boards() -> list[Board]:
    scores = [
        score("digits-test", "log_likelihood", 0.5, headline="in-distribution"),
        score("digits-test", "acc1", 0.61),
        score("digits-test", "acc5", 0.62),
        score("digits-retrieval", "text_retrieval_recall@1", 0.63),
        score("digits-retrieval", "text_retrieval_recall@5", 0.64),
    ]
    return build(
        [
            make_record("cluster-aware[tau=0.8]", scores=scores, strategy={"name": "cluster-aware[tau=0.8]"}),
            *runs("dense", {0: 0.25, 1: 0.5}),
            failure("zzz", reason='said "no", twice'),
            make_record("dense", protocol=OPEN),
        ]
    )


def test_all_formats_carry_the_same_rows(boards: list[Board]) -> None:
    three = {0: 0.1, 1: 0.2, 2: 0.4}
    ranked = [*runs("new", three, protocol={"name": "z"}), *runs("dense", three, protocol={"name": "z"})]
    boards = boards + build([*ranked, *runs("few", {0: 0.9}, protocol={"name": "z"})])
    expected = [(row.rank, row.label) for board in boards for row in board.rows]
    assert expected == [
        (None, "cluster-aware[tau=0.8]"), (None, "dense"), (None, "zzz"), (None, "dense"),
        (None, "few"), (1, "dense"), (2, "new"),
    ]  # fmt: skip
    document = json.loads(render(boards, "json"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [(row["rank"], row["label"]) for board in document["boards"] for row in board["rows"]] == expected
    lines = list(csv.DictReader(io.StringIO(render(boards, "csv"))))
    assert [(int(line["rank"]) if line["rank"] else None, line["label"]) for line in lines] == expected
    markdown = [line.split(" | ") for line in render(boards, "md").splitlines() if line.startswith("| ")]
    shown = [(cells[0].removeprefix("| "), cells[1]) for cells in markdown if cells[0] not in ("| #", "| ---")]
    assert shown == [(str(rank or "-"), label) for rank, label in expected]
    terminal = [line.split() for line in render(boards, "terminal", 250).splitlines()]
    shown = [(cells[0], cells[1]) for cells in terminal if len(cells) > 2 and (cells[0] == "-" or cells[0].isdigit())]
    assert shown == [(str(rank or "-"), label) for rank, label in expected]


def test_metrics_of_tables_and_of_files(boards: list[Board]) -> None:
    for format in ("terminal", "md"):
        text = render(boards, format, 250)
        assert "0.6100" in text and "0.6300" in text and "0.6200" not in text and "0.6400" not in text
    line = next(csv.DictReader(io.StringIO(render(boards, "csv"))))
    assert line["zero-shot/digits-test/acc5"] == "0.62"
    assert line["zero-shot/digits-retrieval/text_retrieval_recall@5"] == "0.64"
    assert line["board_training_fingerprint"] == "train-fingerprint" and line["in-distribution mean"] == "0.5"
    row = json.loads(render(boards, "json"))["boards"][0]["rows"][0]
    assert row["scores"]["zero-shot/digits-test/acc5"] == 0.62
    assert row["headlines"]["in-distribution"]["mean"] == {"mean": 0.5, "half_width": None, "n": 1}


def test_the_caption_says_what_the_numbers_are(boards: list[Board]) -> None:
    for format in ("terminal", "md", "json"):
        text = " ".join(render(boards, format, 100).split())
        assert "in-distribution: mean of zero-shot/digits-test/log_likelihood; higher is better." in text
        assert "vs dense: the score minus that of dense." in text
        assert "never mixed" not in text and "log_rank" not in text  # one headline, of another metric
        for note in NOTES:
            assert note in text
    assert "95 % Student-t" in NOTES[0] and "Over few seeds such an interval is wide" in NOTES[0]


def test_the_caption_groups_the_many_parts_of_a_headline_by_metric() -> None:
    def caption(names: list[tuple[str, str]], **changes: Any) -> str:
        parts = [score(dataset, metric, 0.5, headline="in") | changes for dataset, metric in names]
        return " ".join(render(build([make_record(scores=parts)]), "terminal", 300).split())

    few = [("a", "acc1"), ("b", "acc1"), ("c", "acc1"), ("d", "text_retrieval_recall@1")]
    assert (
        "in: mean of zero-shot/a/acc1, zero-shot/b/acc1, zero-shot/c/acc1, "
        "zero-shot/d/text_retrieval_recall@1; higher is better."
    ) in caption(few)
    assert (
        "in: mean of 5 scores (zero-shot acc1 on a, b, c; text_retrieval_recall@1 on d, e); higher is better."
    ) in caption([*few, ("e", "text_retrieval_recall@1")])
    other = score("f", "acc1", 0.5, headline="in") | {"suite": "few-shot"}
    parts = [*(score(dataset, metric, 0.5, headline="in") for dataset, metric in few), other]
    assert "(few-shot acc1 on f; zero-shot acc1 on a, b, c; text_retrieval_recall@1 on d)" in " ".join(
        render(build([make_record(scores=parts)]), "md").split()
    )


def test_tables_for_people_show_the_averages_of_a_suite_that_has_them() -> None:
    metrics = ("acc1", "acc5", "acc1[seen]", "text_retrieval_recall@1")
    parts = [score("average", metric, 0.71 + i / 100) for i, metric in enumerate(metrics)]
    parts += [score(dataset, "acc1", 0.31 + i / 100, headline="in") for i, dataset in enumerate("ab")]
    parts += [score("elsewhere", "text_retrieval_recall@1", 0.41)]
    other = score("c", "acc1", 0.51) | {"suite": "few-shot"}
    boards = build([make_record(scores=[*parts, other])])
    shown = ["few-shot/c/acc1", "zero-shot/average/acc1", "zero-shot/average/text_retrieval_recall@1"]
    headers = next(line for line in render(boards, "md").splitlines() if line.startswith("| #")).split(" | ")
    assert [header for header in headers if "/" in header] == shown
    for format in ("md", "terminal"):
        text = render(boards, format, 300)
        assert all(value in text for value in ("0.5100", "0.7100", "0.7400"))
        assert not any(value in text for value in ("0.7200", "0.7300", "0.3100", "0.3200", "0.4100"))
    line = next(csv.DictReader(io.StringIO(render(boards, "csv"))))
    row = json.loads(render(boards, "json"))["boards"][0]["rows"][0]
    for part in (*parts, other):
        name = f"{part['suite']}/{part['dataset']}/{part['metric']}"
        assert float(line[name]) == row["scores"][name] == part["value"]


def test_a_narrow_terminal_has_what_a_reader_needs_first_in_one_table() -> None:
    """Rank, score, difference, verdict and cost of long names, of many runs and of one that failed, in 80 columns."""
    made = [*runs("sparse-upcycling", {0: 2.0, 1: 2.1, 2: 2.2, 3: 1.9}), failure("zzz", reason="out of memory")]
    new = {0: 3.0, 1: 3.11, 2: 3.22, 3: 2.93}  # differences 1, 1.01, 1.02, 1.03: sd 0.01291, by 2, times 3.182
    label = "new[" + "x" * 40 + "]"
    made += runs(label, new, strategy={"name": label, "status": "reconstructed"})
    text = render(build(made), "terminal", 80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and sum("─" in line for line in lines) == 1
    cells = [line.split() for line in lines if line[:8].strip() and line.startswith("  ")]
    best, reference, failed = cells[1:]
    assert best[0] == "1" and best[2:] == ["4", "3.0650±0.2023", "+1.0150±0.0205", "better", "1.00x"]
    assert reference == ["2", "sparse-upcycling", "4", "2.0500±0.2054", "reference", "1.00x"]
    assert failed == ["-", "zzz", "0", "failed"]
    assert "(reconstructed)" in text and "zzz: failed: out of memory." in text
    assert "Reference: sparse-upcycling." in text and "More columns: --wide." in text


def test_a_narrow_terminal_loses_no_number(boards: list[Board]) -> None:
    wide, narrow = render(boards, "terminal", 250), render(boards, "terminal", 80, wide=True)
    assert max(map(len, narrow.splitlines())) <= 80
    for number in ("0.3750 ± 1.5883", "0.5000 (n=1)", "0.6100", "0.6300", "2.00e+04", "2.10e+04", "25.00%"):
        assert number in wide and number in narrow  # dense: 1/4, 1/2: sd sqrt(2) / 8 -> T1 / 8 = 1.5883


def test_a_narrow_terminal_splits_many_columns_into_tables_that_all_say_who() -> None:
    """Twenty-two scores of five suites, and a long name: at no width is a number or a header cut off."""
    names = [("few-shot", f"categories/{shots}-shot", "acc1") for shots in range(1, 19)]
    names += [("zero-shot", "average", "text_retrieval_recall@1"), ("compositional", "average", "group_score")]
    names += [("fine-tune", "digits/all", "acc1"), ("linear-probe", "digits", "acc1")]
    parts = [
        score(dataset, metric, 0.1 + place / 1000) | {"suite": suite, "standard_error": 0.01}
        for place, (suite, dataset, metric) in enumerate(names)
    ]
    strategies = ["dense", "cluster-aware[tau=0.8,layers=all]", "x" * 40]
    losses = [score("a", "loss", seed / 8, headline="in", lower=True) for seed in (0, 1, 2)]
    boards = build(
        [
            make_record(label, train=seed, scores=[loss, *parts], strategy={"name": label})
            for label in strategies
            for seed, loss in enumerate(losses)
        ]
    )
    for width in (60, 80, 100, 140):
        text = render(boards, "terminal", width, wide=True)
        assert max(map(len, text.splitlines())) <= width
        lines = text.splitlines()
        heads = [lines[place - 1] for place, line in enumerate(lines) if "─" in line]
        assert len(heads) > 3 and all(head.split()[:2] == ["#", "strategy"] for head in heads)
        words = text.split()
        for place in range(len(names)):
            assert words.count(f"{0.1 + place / 1000:.4f}") == 3
        for header in (
            "categories",
            "18-shot",
            "compositional",
            "group_score",
            "linear-probe",
            "recall@1",
            "parameters",
        ):
            assert header in words
        assert [sum(line.startswith(f"  {rank}  ") for line in lines) for rank in "123"] == [len(heads)] * 3


def test_suites_without_a_column_are_named() -> None:
    parts = [score("a", "acc1", 0.5, headline="in"), score("a", "entropy", 0.5) | {"suite": "diagnostics"}]
    record = make_record(scores=parts, protocol={"suite_fingerprints": {"zero-shot": "z", "diagnostics": "d"}})
    for format in ("terminal", "md", "json"):
        assert "No column here for diagnostics: scores are in csv and json" in " ".join(
            render(build([record]), format, 90).split()
        )
    alone = make_record(scores=parts[:1], protocol={"suite_fingerprints": {"zero-shot": "z"}})
    assert "No column" not in render(build([alone]), "md")


def test_headers_say_what_plus_minus_is() -> None:
    boards = build(runs("dense", {0: 1.0, 1: 3.0}) + runs("new", {0: 1.5, 1: 2.0}))
    header = next(line for line in render(boards, "md").splitlines() if line.startswith("| #"))
    assert "| in-distribution (± 95 %) | vs dense (± 95 %) |" in header
    one = render(build(runs("dense", {0: 1.0}) + runs("new", {0: 1.5})), "md")
    assert "| in-distribution | vs dense |" in one


def test_a_metric_that_no_score_has_is_told(boards: list[Board]) -> None:
    with pytest.raises(UserError, match="unknown metric 'nope'"):
        render(boards, "md", metrics=["nope"])


def test_a_reader_sees_first_who_is_better(two: list[Board]) -> None:
    """Above the table, in the formats for people; run ids lead from a row to its records."""
    for format in ("terminal", "md"):
        text = " ".join(render(two, format).split())
        sentence = re.findall(r"\w[\w-]*, against \w[\w-]*: [^.]*\.", text)[0]
        assert text.index(sentence) < text.index("strategy")
    line = next(csv.DictReader(io.StringIO(render(two, "csv"))))
    assert line["records"].split() == list(two[0].rows[0].records)
    assert len(two[0].rows[0].records) == two[0].rows[0].runs > 0


def test_unknown_format() -> None:
    with pytest.raises(UserError, match=r"unknown format 'markdown'.* There are: csv, json, latex, md, terminal"):
        render(build([make_record()]), "markdown")


def test_the_caption_names_the_largest_error_of_the_rows() -> None:
    """The best row has the smallest error here."""
    made = []
    for label, value, error in (("dense", 0.6, 0.01), ("zzz", 0.5, 0.03), ("aaa", 0.4, 0.02)):
        part = score("digits-test", "acc1", value, headline="in")
        part |= {"standard_error": error, "interval": (value - 2 * error, value + 2 * error)}
        made.append(make_record(label, scores=[part]))
    text = " ".join(render(build(made), "md").split())
    assert "the standard error is at most: in 0.0300; rows share the samples" in text


# ---- several headline scores -----------------------------------------------------------------------------------


@pytest.fixture
def two() -> list[Board]:
    """Two runs each of `dense` and `new`, with two headlines; lower is better."""
    return build(
        [
            *two_headlines("dense", {0: 2.0, 1: 3.0}, {0: 4.0, 1: 6.0}),
            *two_headlines("new", {0: 1.0, 1: 2.5}, {0: 5.0, 1: 6.5}),
            failure("zzz"),
        ]
    )


def test_every_format_holds_every_headline_and_its_difference(two: list[Board]) -> None:
    first, second, failed = csv.DictReader(io.StringIO(render(two, "csv")))
    assert [row["label"] for row in (first, second, failed)] == ["new", "dense", "zzz"]
    expected = {
        "in-distribution mean": 1.75, "in-distribution n": 2,
        "in-distribution difference mean": -0.75, "in-distribution difference n": 2,  # -1 and -0.5
        "shift mean": 5.75, "shift n": 2, "shift difference mean": 0.75, "shift difference n": 2,  # 1 and 0.5
    }  # fmt: skip
    assert {name: float(first[name]) for name in expected} == expected
    # -1 and -0.5, 1 and 0.5: sd sqrt(1/8), by sqrt(2) 1/4 -> T1 / 4
    for name in ("in-distribution", "shift"):
        assert float(first[f"{name} difference half_width"]) == pytest.approx(12.706205 / 4)
        assert [second[f"{name} difference {part}"] for part in ("mean", "half_width", "n")] == ["", "", ""]
        assert [failed[f"{name} {part}"] for part in ("mean", "half_width", "n", "standard error")] == [""] * 4
    assert first["board_headlines"] == "in-distribution shift"

    (board,) = json.loads(render(two, "json"))["boards"]
    assert board["headlines"] == {
        "in-distribution": {"parts": ["zero-shot/a/log_rank"], "higher_is_better": False, "chance": None},
        "shift": {"parts": ["zero-shot/b/log_rank"], "higher_is_better": False, "chance": None},
    }
    new, dense, zzz = board["rows"]
    assert [new["headlines"][name]["mean"]["mean"] for name in board["headlines"]] == [1.75, 5.75]
    assert [new["headlines"][name]["difference"]["mean"] for name in board["headlines"]] == [-0.75, 0.75]
    assert dense["headlines"]["shift"]["difference"] is None and zzz["headlines"] == {}

    header, _, row, baseline, *_ = (line for line in render(two, "md").splitlines() if line.startswith("| "))
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    columns = ["in-distribution", "in-distribution vs dense", "shift", "shift vs dense"]
    found = [cells[f"{column} (± 95 %)"] for column in columns]
    assert [cell.split(" ±")[0] for cell in found] == ["1.7500", "-0.7500", "5.7500", "+0.7500"]
    cells = dict(zip(header.split(" | "), baseline.split(" | "), strict=True))
    assert [cells[f"{column} (± 95 %)"] for column in columns[1::2]] == ["-", "-"]
    for width in (80, 300):
        text = render(two, "terminal", width, wide=True)
        assert all(value in text for value in ("1.7500", "-0.7500", "5.7500", "+0.7500", "2.5000", "5.0000"))


def test_the_caption_says_direction_chance_and_that_headlines_are_never_mixed() -> None:
    scores = [
        score("a", "log_rank", 1.0, headline="near", lower=True),
        score("b", "image_retrieval_log_rank", 2.0, headline="near", lower=True),
        score("c", "acc1", 0.5, headline="photos"),
    ]
    headlines = headlines_of(scores)
    headlines["near"] |= {"chance": 3.25, "standard_error": 0.125}
    boards = build([make_record(scores=scores, headlines=headlines)])
    for format in ("terminal", "md", "json"):
        text = " ".join(render(boards, format, 100).split())
        assert (
            "near: mean of zero-shot/a/log_rank, zero-shot/b/image_retrieval_log_rank; lower is better, "
            "chance is 3.2500."
        ) in text
        assert "photos: mean of zero-shot/c/acc1; higher is better." in text  # no chance is known
        assert "Ranks are by near; the headline scores are never mixed." in text
        assert "log_rank: mean ln(1 + wrong answers nearer than the right one); e to it is a geometric mean." in text
        assert "the standard error is at most: near 0.1250; rows share" in text
    alone = build([make_record(scores=scores[2:])])
    text = render(alone, "md")
    assert "never mixed" not in text and "log_rank" not in text and "standard error is at most" not in text


def test_boards_of_different_headlines_share_one_header_of_csv(two: list[Board]) -> None:
    other = make_record(
        scores=[score("x", "acc1", 0.5, headline="few-shot") | {"suite": "few-shot"}],
        protocol={"suite_fingerprints": {"few-shot": "other"}},
    )
    boards = [*two, *build([other])]
    text = render(boards, "csv")
    header, *lines = csv.reader(io.StringIO(text))
    assert len(set(header)) == len(header) and {len(line) for line in lines} == {len(header)} and len(lines) == 4
    for name in ("in-distribution", "shift", "few-shot"):
        for part in ("mean", "half_width", "n", "difference mean", "difference half_width", "difference n"):
            assert f"{name} {part}" in header
        assert f"{name} standard error" in header
    *_, last = csv.DictReader(io.StringIO(text))
    assert (last["few-shot mean"], last["shift mean"], last["in-distribution n"]) == ("0.5", "", "")
    assert next(csv.DictReader(io.StringIO(text)))["few-shot mean"] == ""


HOSTILE = [
    "<script>alert(1)</script>",
    "a|b\\|c",
    "two\nlines",
    "=HYPERLINK(1)",
    "\x1b[31mred",
    "$x_1$ *b* `c`",
    "x" * 200,
]


def test_hostile_names_are_harmless_in_every_format() -> None:
    made = [make_record(name, strategy={"name": name}) for name in HOSTILE] + [
        failure("failed", reason="\x1b]0;title\x07 =1+1 | <b>")
    ]
    boards = build(made)
    for format in ("terminal", "md", "csv", "json", "latex"):
        text = render(boards, format, 80)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text), format
    rows = [line for line in render(boards, "md").splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows}) == 1 and len(rows) == 2 + len(made)
    assert not any(re.search(r"(?<!\\)<", row) for row in rows)
    cells = [row["label"] for row in csv.DictReader(io.StringIO(render(boards, "csv")))]
    assert "'=HYPERLINK(1)" in cells and not any(cell.startswith("=") for cell in cells)
    assert max(map(len, render(boards, "terminal", 80).splitlines())) <= 80


def test_hundreds_of_strategies_have_a_table() -> None:
    boards = build(
        [make_record(f"s{k}", init=s, train=s, value=k + s / 7 + k * s / 900) for k in range(400) for s in range(3)]
    )
    text = render(boards, "terminal", 80)
    assert text.count("not yet ranked") == 0 and len(boards[0].rows) == 400
