"""The HTML page without a browser: what is escaped, allowed and bold, what it holds, and how large it is."""

import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.records import make_record, tuned_part
from tests.reporting.html_records import CLOSING, LAYERS, LONG, SCRIPT, SIGNS, hard_records, many_records, placed
from tests.reporting.test_leaderboard import failure, runs
from upcycle_bench.record import Record
from upcycle_bench.reporting.formats import only
from upcycle_bench.reporting.formats import render as as_text
from upcycle_bench.reporting.html import page
from upcycle_bench.reporting.html.record_details import thinned
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.reporting.published import Published
from upcycle_bench.util.errors import UserError

ROOT = Path(__file__).parents[2]
HTML = ROOT / "upcycle_bench" / "reporting" / "html"


class Seen(HTMLParser):
    """What a browser would make of the page: elements with attributes and text, and the rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.bold: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "strong":
            self.bold.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "elements are closed in order"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self._open[-1:] == ["style"]:
            self.styles.append(data)
        if "strong" in self._open:
            self.bold[-1] += data
        if {"td", "th"} & {*self._open}:
            self.rows[-1][-1] += data

    def row(self, start: str) -> list[str]:
        """The first row whose name begins so, its spaces made single."""
        rows = ([" ".join(cell.split()) for cell in row] for row in self.rows)
        return next(row for row in rows if len(row) > 1 and row[1].startswith(start))

    @property
    def data(self) -> dict[str, Any]:
        ((_, text),) = [each for each in self.scripts if each[0].get("type") == "application/json"]
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def made(records: list[Record], folder: Path, steps: int = 0, **changes: Any) -> str:
    return page.render(build(records), placed(records, folder, steps), **changes)


def sha(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made(hard_records(), tmp_path_factory.mktemp("hard"), steps=30)


# ---- safe ------------------------------------------------------------------------------------------------------


def test_names_are_text_and_never_markup(hard: str) -> None:
    seen = Seen(hard)
    names = [row[1] for row in seen.rows if len(row) > 1]
    for name in (SCRIPT, CLOSING, LONG, SIGNS):
        assert name in [each.strip() for each in names]
    assert [tag for tag, _ in seen.tags if tag in ("img", "iframe", "object", "form")] == []
    assert "alert(" not in "".join(text for kind, text in seen.scripts if not kind)
    titles = {row["title"] for row in seen.data["boards"][0]["rows"]}
    assert {SCRIPT, CLOSING, LONG, SIGNS} <= titles
    assert "49" not in next(name for name in names if name.startswith("a|b$c_d")), "a name is no template"


def test_the_policy_allows_these_scripts_and_this_style_and_nothing_else(hard: str) -> None:
    seen = Seen(hard)
    (policy,) = [
        a["content"] or "" for tag, a in seen.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    code = [text for kind, text in seen.scripts if not kind]
    assert len(code) == 3 and len(seen.styles) == 1
    assert rules == {
        "default-src": "'none'",
        "script-src": " ".join(map(sha, code)),
        "style-src": sha(seen.styles[0]),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for tag, attributes in seen.tags:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes), tag
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))


def test_data_cannot_end_its_element() -> None:
    text = page.script_safe({"name": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"name": "</script><!-- & \u2028"}


def test_vendored_code_is_what_its_readme_says() -> None:
    for readme in (HTML / "vendor" / "README.md", Path(__file__).parent / "vendor" / "README.md"):
        said = set(re.findall(r"`([0-9a-f]{64})`", readme.read_text()))
        assert said == {hashlib.sha256(path.read_bytes()).hexdigest() for path in readme.parent.glob("*.js")}
    for path in HTML.rglob("*.js"):
        text = path.read_bytes()
        assert not re.search(rb"</script|<!--|\r", text, re.IGNORECASE), f"{path.name} would end its element"


# ---- right -----------------------------------------------------------------------------------------------------


def test_only_what_is_outside_the_noise_is_bold(hard: str) -> None:
    seen = Seen(hard)
    # up: +1.0, +1.01, +1.01; down: -0.5, -0.51, -0.49; level: +0.1, -0.12, +0.04: within the noise
    assert sorted(" ".join(each.split()) for each in seen.bold) == [
        "+1.0067 ± 0.0143 (n=3) better",
        "-0.5000 ± 0.0248 (n=3) worse",
    ]
    assert seen.row("level")[4].endswith(("undecided", "tied"))
    assert seen.row("sparse-upcycling")[4] == "reference"
    assert seen.row(LONG)[4] == "-0.3000 (n=1) not yet ranked"


def test_the_table_has_the_numbers_of_the_other_formats(hard: str) -> None:
    seen = Seen(hard)
    assert seen.rows[0][:5] == ["rank", "strategy", "n", "in-distribution", "in-distribution vs sparse-upcycling"]
    assert seen.rows[0][5:] == ["charged FLOPs", "certified", "runs"]
    up = seen.row("up")
    assert (up[0], up[1], up[2], up[5], up[6], up[7]) == (
        "1",
        "up reconstructed",
        "3",
        "1.00x",
        "0 of 3",
        "ok, 1 failed",
    )
    markdown = as_text(build(hard_records()), "md")
    for name in ("up", "down", "level", "sparse-upcycling"):
        assert seen.row(name)[3] in markdown
    text = hard.partition("<script")[0]
    assert "in-distribution, against sparse-upcycling: better: up; worse: down; " in text
    assert "broken" in seen.row("broken")[1] and seen.row("broken")[7].startswith("failed: RuntimeError: </script>")


def test_a_row_has_all_its_records_and_says_which_count(tmp_path: Path) -> None:
    first = make_record("sparse-upcycling", value=1.0, command=["upcycle-bench", "run", "-o", "name=a b"])
    again = make_record("sparse-upcycling", value=1.5, run_id="newer-one", created="2026-02-01T00:00:00Z")
    records = [again, failure("sparse-upcycling", train=3, reason="out of memory"), first]
    seen = Seen(made(records, tmp_path / "mine", steps=3)).data
    (row,) = seen["boards"][0]["rows"]
    assert [(each["counts"], each["path"]) for each in row["records"]] == [
        ("counts", "mine/0000.json"),
        ("failed", "mine/0001.json"),
        ("superseded by a newer run", "mine/0002.json"),
    ]
    assert row["records"][2]["command"] == "upcycle-bench run -o 'name=a b'"
    assert row["records"][1]["reason"] == "out of memory"
    assert row["records"][0]["hashes"] == {
        "dense": "dense-hash",
        "data": "data-hash",
        "weights": None,
        "outcomes": None,
    }
    assert row["records"][0]["phases"]["train"] == [10, 20_000, 1, 0, 0, None]
    assert seen["shared"][row["records"][0]["environment"]] == {"python": "3.11"}
    (curve,) = row["curves"]
    assert (seen["shared"][curve[0]], curve[1]) == ([0, 1, 2], [2, 1, 0.66667])


def test_a_tuned_record_shows_what_its_tuning_cost(tmp_path: Path) -> None:
    part = tuned_part(("new", [0.5, 0.6]), ("new[a=2]", [0.6, 0.7]))
    seen = Seen(made([make_record("new[tuned]", strategy={"tuned": part})], tmp_path)).data
    (row,) = seen["boards"][0]["rows"]
    (shown,) = row["records"]
    assert shown["phases"]["tuning"] == [8, 4_000, *[None] * 4] and row["flops"] == 25_000
    assert len(seen["shared"][shown["strategy"]]["tuned"]["candidates"]) == 2


def test_closed_rows_of_an_open_board_have_their_records(tmp_path: Path) -> None:
    seen = Seen(made([make_record("sparse-upcycling"), make_record("new[a=2]", value=0.1)], tmp_path)).data
    assert [[(row["name"], len(row["records"])) for row in board["rows"]] for board in seen["boards"]] == [
        [("sparse-upcycling", 1)],
        [("sparse-upcycling (closed division)", 1), ("new[a=2]", 1)],
    ]


def test_differences_by_dataset_are_to_the_reference(hard: str) -> None:
    first, second = Seen(hard).data["boards"]
    differences = {row["name"]: row["differences"] for row in first["rows"]}
    assert differences["up (reconstructed)"]["in-distribution"] == [pytest.approx(2.00667 - 1.0, abs=1e-4)]
    assert differences["sparse-upcycling"] == differences["broken"] == {}  # nothing to compare with
    assert second["headlines"][0]["higher"] is False


def test_diagnostics_stand_in_a_table(hard: str) -> None:
    row = next(row for row in Seen(hard).rows if row[0] == "sparse-upcycling" and len(row) > 3)
    assert row == [
        "sparse-upcycling",
        *("0.1000 → 0.1000", "0.9000 → 0.9000", "1.5000 → 1.5000", "70.0% → 70.0%"),
        "25.00%",
    ]


def test_ranks_stand_in_a_table_and_a_missing_diagram_is_one_line(hard: str) -> None:
    """up is first of four over three seeds and down last; the critical difference is 2.569 sqrt(4 * 5 / 18) = 2.71."""
    seen = Seen(hard)
    ranks = {row[0]: row[1:] for row in seen.rows if len(row) == 3}
    assert ranks["up"] == ["1.00", "a"] and ranks["down"][0] == "4.00" and ranks["strategy"] == ["mean rank", "bars"]
    assert len(ranks) == 5  # a header and four
    first, second = seen.data["boards"]
    (headline,) = first["headlines"]
    assert headline["ranking"]["strategies"][0]["name"] == "up (reconstructed)"
    assert headline["ranking"]["distance"] == pytest.approx(2.7081, abs=1e-4) and headline["ranking"]["ranked"] == 4
    assert "the blocks are seeds and not sets" in headline["ranking"]["said"]
    assert second["headlines"][0]["ranking"] is None
    assert hard.count("shift: a critical-difference diagram needs 3 strategies with 3 training seeds in common") == 1


def test_ranks_are_of_all_strategies_whichever_rows_are_shown(tmp_path: Path) -> None:
    boards = only(build(hard_records()), ["level"])
    (headline,) = Seen(page.render(boards, placed(hard_records(), tmp_path))).data["boards"][0]["headlines"]
    assert [each["title"] for each in headline["ranking"]["strategies"]] == ["level", "sparse-upcycling"]
    assert headline["ranking"]["ranked"] == 4


def test_a_papers_numbers_stand_in_the_drawers_data(tmp_path: Path) -> None:
    number = Published("ImageNet", "63.1", "A paper, 2026", "another schedule")
    text = made(hard_records(), tmp_path, published=lambda row: [number] if row.label == "up" else [])
    rows = {row["title"]: row["published"] for row in Seen(text).data["boards"][0]["rows"]}
    assert rows["up (reconstructed)"] == [vars(number)] and rows["down"] == []


def test_the_same_records_give_the_same_bytes(hard: str, tmp_path: Path) -> None:
    records = hard_records()
    found = list(placed(records, tmp_path / "hard0", 30))
    once = page.render(build(records), found)
    random.Random(0).shuffle(found)
    assert page.render(build([record for record, _ in found]), found) == once


# ---- few, many, broken -----------------------------------------------------------------------------------------


def test_one_record_no_score_and_all_failed_make_a_page(tmp_path: Path) -> None:
    one = Seen(made([make_record("dense")], tmp_path))
    assert one.row("dense")[2:4] == ["1", "0.5000 (n=1)"]
    failed = Seen(made([failure("dense"), failure("new")], tmp_path))
    assert failed.rows[0] == ["rank", "strategy", "n", "charged FLOPs", "certified", "runs"]
    assert failed.row("new")[0] == "-" and failed.row("new")[-1] == "failed: RuntimeError: out of memory"
    assert failed.data["boards"][0]["headlines"] == []
    alone = Seen(made(runs("new", {0: 1.0}), tmp_path))  # no reference, so no difference and no ratio
    assert alone.row("new")[3:] == ["1.0000 (n=1)", "2.10e+04", "0 of 1", "ok"]


def test_a_thousand_rows_stay_below_five_megabytes(tmp_path: Path) -> None:
    records = many_records(1000)
    text = made(records, tmp_path, steps=400)
    seen = Seen(text)
    assert len(text.encode()) < 5_000_000 and len(seen.rows) > 1000
    rows = seen.data["boards"][0]["rows"]
    assert {len(row["curves"][0][1]) for row in rows} == {60} and "receipt" not in rows[0]["records"][0]


def test_curves_are_thinned_and_keep_both_ends(tmp_path: Path) -> None:
    assert thinned(range(5), 5) == [0, 1, 2, 3, 4] and thinned(range(1001), 5) == [0, 250, 500, 750, 1000]
    data = Seen(made([make_record("dense", receipt=LAYERS)], tmp_path, steps=1000)).data
    (row,) = data["boards"][0]["rows"]
    steps = data["shared"][row["curves"][0][0]]
    assert (len(steps), steps[0], steps[-1]) == (200, 0, 999)
    assert row["records"][0]["receipt"]["layers"] == LAYERS["layers"]


def test_metrics_that_are_no_json_are_one_line(tmp_path: Path) -> None:
    found = placed([make_record("dense")], tmp_path, steps=3)
    beside = tmp_path / "0000.jsonl"
    beside.write_text('{"step": 1, "contrastive": 1.0}\n{"step": 2, "contrastive": NaN}\n')
    with pytest.raises(UserError, match=r"0000\.jsonl, line 2: NaN is no JSON; restore the file, or move it away\.$"):
        page.render(build([found[0][0]]), found)
    beside.write_text('{"step": 1, "loss": 1.0}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n')
    assert Seen(page.render(build([found[0][0]]), found)).data["boards"][0]["rows"][0]["curves"][0][1] == [1, 0.5]
