"""The HTML page in a headless Chromium: sorting, filters, drawer, figures, accessibility; and it asks for nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import browser as chromium
from tests.reporting.html_records import CLOSING, LONG, SCRIPT, hard_records, many_records, placed
from upcycle_bench.reporting.html import page as html
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.reporting.published import Published

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
WHY = chromium.missing()
DESK, PHONE = {"width": 1200, "height": 900}, {"width": 360, "height": 740}

pytestmark = pytest.mark.skipif(bool(WHY) and not chromium.needed(), reason=WHY or "there is a browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert not WHY, WHY
    with chromium.opened() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    records = hard_records()
    number = Published("ImageNet", "63.1", "A paper, 2026", SCRIPT)
    text = html.render(
        build(records), placed(records, folder, 30), lambda row: [number] if row.label.startswith("up") else []
    )
    (folder / "report.html").write_text(text)
    return folder / "report.html"


@pytest.fixture
def visit(browser: Any, report: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end of the test nothing may have been logged, raised, violated or requested."""
    complaints: list[str] = []
    contexts = []

    def opened(path: Path = report, size: dict[str, int] = DESK, **settings: Any) -> Any:
        context = browser.new_context(viewport=size, **settings)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: (complaints.append(f"alert: {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
        tab.goto(path.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def names(tab: Any) -> list[str]:
    """The strategies that the first table shows, in its order."""
    return tab.locator("#board-1 button.open").evaluate_all(
        "all => all.filter(b => b.offsetParent).map(b => b.textContent)"
    )


def axe(tab: Any) -> list[str]:
    """What axe-core finds wrong, however light."""
    tab.evaluate(AXE.read_text())  # by the debugger's protocol: the page's policy allows no foreign script
    found = tab.evaluate("() => axe.run(document).then(result => result.violations)")
    return [f"{each['id']}: {node['target']}" for each in found for node in each["nodes"]]


# ---- table -----------------------------------------------------------------------------------------------------


def test_a_header_sorts_both_ways_and_rows_without_a_value_stay_last(visit: Callable[..., Any]) -> None:
    tab = visit()
    header = tab.locator("#board-1 thead th").nth(3)
    assert names(tab)[0] == "up"
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert (names(tab)[0], names(tab)[-1]) == ("down", "broken")
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert (names(tab)[0], names(tab)[-1]) == ("up", "broken")
    tab.locator("#board-1 thead th").nth(1).get_by_role("button").click()
    assert header.get_attribute("aria-sort") is None
    assert names(tab).index("broken") < names(tab).index("level") < names(tab).index("up")


def test_words_and_verdicts_filter_and_the_charts_follow(visit: Callable[..., Any]) -> None:
    tab = visit()
    board = tab.locator("#board-1")
    assert board.get_by_role("status").text_content() == "9 of 9 rows"
    from playwright.sync_api import expect

    dots = board.locator("figure").first.locator("svg g[aria-label='dot']").first.locator("circle")
    assert dots.count() == 8
    board.get_by_label("Filter").fill("reconstructed UP")
    assert names(tab) == ["up"]
    board.get_by_label("Filter").fill("-script -long")
    assert names(tab) == ["up", "level", "sparse-upcycling", "a|b$c_d&amp;\"'{{ 7 * 7 }}", "down"]
    board.get_by_label("Verdict").select_option("worse")
    assert names(tab) == ["down"] and board.get_by_role("status").text_content() == "1 of 9 rows"
    expect(dots).to_have_count(1)
    board.get_by_label("Filter").fill("nothing has this")
    board.get_by_text("No row with a score is shown").wait_for()


def test_bold_is_what_is_resolved(visit: Callable[..., Any]) -> None:
    tab = visit()
    heavy = tab.locator("#board-1 .standings tbody").evaluate(
        "body => [...body.querySelectorAll('*')].filter(e => getComputedStyle(e).fontWeight >= 600 && "
        "e.tagName === 'STRONG').map(e => e.closest('tr').querySelector('th').innerText)"
    )
    every = tab.locator("#board-1 .standings tbody").evaluate(
        "body => [...body.querySelectorAll('*')].filter(e => getComputedStyle(e).fontWeight >= 600 && "
        "!e.closest('strong')).length"
    )
    assert [each.split()[0] for each in heavy] == ["up", "down"] and every == 0


# ---- drawer ----------------------------------------------------------------------------------------------------


def test_a_row_opens_by_mouse_and_closes_by_button_and_beside_it(visit: Callable[..., Any]) -> None:
    tab = visit()
    drawer = tab.get_by_role("dialog")
    tab.locator("#board-1 tbody tr", has_text="level").locator("td").first.click()
    assert drawer.get_by_role("heading", level=2).text_content() == "level"
    drawer.get_by_role("button", name="Close").click()
    assert drawer.count() == 0
    assert tab.evaluate("document.activeElement.textContent") == "level"
    tab.locator("#board-1").get_by_role("button", name="down", exact=True).click()
    assert drawer.is_visible()
    tab.mouse.click(20, 400)
    assert drawer.count() == 0


def test_a_row_opens_by_keyboard_and_escape_gives_the_focus_back(visit: Callable[..., Any]) -> None:
    tab = visit()
    opener = tab.locator("#board-1").get_by_role("button", name="up", exact=True)
    opener.focus()
    tab.keyboard.press("Enter")
    drawer = tab.get_by_role("dialog")
    assert drawer.is_visible() and tab.evaluate("document.activeElement.closest('dialog') !== null")
    for _ in range(40):  # the focus does not leave the drawer for the page behind it
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    tab.keyboard.press("Escape")
    assert drawer.count() == 0
    assert opener.evaluate("each => each === document.activeElement")


def test_the_drawer_has_what_a_sceptic_asks_for(visit: Callable[..., Any]) -> None:
    tab = visit()
    tab.locator("#board-1").get_by_role("button", name="up", exact=True).click()
    drawer = tab.get_by_role("dialog")
    text = drawer.text_content()
    for said in (
        "verdictbetter",
        "minus sparse-upcycling+1.0067 ± 0.0143 (n=3)",
        "Records (4)",
        "seeds: initialisation 0, training 0; counts",
        "training 9; failed",
        "RuntimeError: out of memory",
        "upcycle-bench run",
        "hash of densedense-hash",
        "Cost by phase",
        "20,000",
        "python3.11",
        "vision.1",
        "63.1",
        SCRIPT,  # of a paper's caveat: text
    ):
        assert said in text, said


def test_names_are_shown_to_the_letter(visit: Callable[..., Any]) -> None:
    tab = visit()
    assert {SCRIPT, CLOSING, LONG} <= {*names(tab)}
    tab.locator("#board-1").get_by_role("button", name=CLOSING).click()
    assert tab.get_by_role("dialog").get_by_role("heading", level=2).text_content() == CLOSING
    assert tab.locator("img").count() == 0


# ---- figures ---------------------------------------------------------------------------------------------------


def test_every_board_has_its_figures(visit: Callable[..., Any]) -> None:
    tab = visit()
    titles = tab.locator("#board-1 figure h3").all_text_contents()
    assert titles == [
        "in-distribution, with 95 % intervals",
        "in-distribution against cost",
        "in-distribution: critical differences of ranks",
        "Training",
        "in-distribution by dataset, minus sparse-upcycling",
    ]
    assert tab.locator("#board-1 figure [role=img][aria-label] > svg").count() == 5
    assert tab.locator("#board-2 figure h3").first.text_content() == "shift, with 95 % intervals"
    assert tab.locator("svg style").count() == 0
    front = tab.locator("#board-1 figure").nth(1).locator("g[aria-label=text] text").all_text_contents()
    assert "up (reconstructed)" in front and "down" not in front  # at equal cost, only the best is not beaten
    frame = tab.locator("#board-1 figure svg").nth(1).bounding_box()
    label = tab.locator("#board-1 figure").nth(1).get_by_text("up (reconstructed)").bounding_box()
    assert label["x"] >= frame["x"] and label["x"] + label["width"] <= frame["x"] + frame["width"]


def test_ranks_have_dots_and_bars_and_follow_the_filter(visit: Callable[..., Any]) -> None:
    """up, level, sparse-upcycling and down: with three seeds no two of four can be told apart, but for the ends."""
    from playwright.sync_api import expect

    tab = visit()
    board = tab.locator("#board-1")
    chart = board.locator("figure", has_text="critical differences of ranks").locator("svg")
    dots = chart.locator("g[aria-label=dot] circle")
    assert dots.count() == 4 and chart.get_by_text("critical difference 2.71").count() == 1
    left = dots.evaluate_all("all => all.map(each => each.getBoundingClientRect().x)")
    assert left == sorted(left) and len({*left}) > 2
    bars = chart.locator("g[aria-label=rule][stroke-width='4'] line")
    assert bars.count() == len({*"".join(board.locator("details td:nth-child(3)").all_text_contents())})
    dots.first.hover(force=True)
    chart.get_by_text("mean rank 1").wait_for()
    board.get_by_label("Filter").fill("level")
    expect(dots).to_have_count(1)
    assert tab.locator("#board-2 figure", has_text="critical").count() == 0
    assert "needs 3 strategies with 3 training seeds" in tab.locator("#board-2 .about").text_content()


def test_a_chart_tells_what_is_under_the_pointer(visit: Callable[..., Any]) -> None:
    tab = visit()
    chart = tab.locator("#board-1 figure svg").first
    dot = chart.locator("g[aria-label=dot]").first.locator("circle").first
    dot.hover(force=True)
    chart.get_by_text("n=3: better").wait_for()


# ---- everywhere ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing(visit: Callable[..., Any], scheme: str, size: dict[str, int]) -> None:
    tab = visit(size=size, color_scheme=scheme)
    assert axe(tab) == []
    tab.locator("#board-1").get_by_role("button", name="up", exact=True).click()
    assert axe(tab) == []


def test_axe_would_find_something(visit: Callable[..., Any]) -> None:
    tab = visit()
    tab.evaluate("document.documentElement.removeAttribute('lang')")
    assert [each.partition(":")[0] for each in axe(tab)] == ["html-has-lang"]


def test_dark_mode_is_dark(visit: Callable[..., Any]) -> None:
    luminance = (
        "() => getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)"
    )
    assert visit(color_scheme="light").evaluate(luminance) > 700
    assert visit(color_scheme="dark").evaluate(luminance) < 100


def test_a_phone_scrolls_tables_and_not_the_page(visit: Callable[..., Any]) -> None:
    tab = visit(size=PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    tab.locator("#board-1").get_by_role("button", name=LONG).click()
    assert tab.get_by_role("dialog").evaluate("each => each.scrollWidth <= each.clientWidth")


def test_print_shows_every_row_on_white_without_controls(visit: Callable[..., Any]) -> None:
    tab = visit(color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.locator(".tools").first.is_hidden()
    assert tab.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator(".scroll").first.evaluate("each => getComputedStyle(each).overflow") == "visible"
    assert tab.pdf(format="A4").startswith(b"%PDF")


def test_without_javascript_it_is_a_plain_table(visit: Callable[..., Any]) -> None:
    tab = visit(java_script_enabled=False)
    assert tab.locator("#board-1 .standings tbody tr").count() == 9
    assert tab.locator("button, figure").count() == 0
    assert tab.locator("noscript p").is_visible()
    assert tab.locator("#board-1 strong").all_inner_texts()[0].split() == ["+1.0067", "±", "0.0143", "(n=3)", "better"]


def test_a_thousand_rows_sort_filter_and_open(visit: Callable[..., Any], tmp_path: Path) -> None:
    records = many_records(1000)
    path = tmp_path / "many.html"
    path.write_text(html.render(build(records), placed(records, tmp_path, 100)))
    tab = visit(path)
    tab.locator("thead th").nth(3).get_by_role("button").click()
    assert names(tab)[0] == "strategy-0[ratio=0]"
    tab.get_by_label("Filter").fill("ratio=77")
    assert len(names(tab)) == 11  # 77 and 770 to 779
    tab.get_by_role("button", name="strategy-770[ratio=770]").click()
    assert "seeds: initialisation 0" in tab.get_by_role("dialog").text_content()
