"""Pictures of the HTML report from results/lab, in docs/figures/: `make screenshots`.

Fonts are the machine's, so another one may give other pixels.
"""

from pathlib import Path

from tests.browser import missing, opened
from upcycle_bench.reporting.collect import collect
from upcycle_bench.reporting.html.page import render
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import write_atomically

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
SHOTS = {  # name -> width, height, colour scheme, whether a row is open
    "report-light": (1200, 920, "light", False),
    "report-dark": (1000, 700, "dark", True),
    "report-phone": (360, 740, "light", False),
}
LARGEST = 200_000  # bytes of a picture


def report() -> str:
    """The page of results/lab."""
    found = collect([ROOT / "results" / "lab"])
    return render(build(found.records, found.outcomes), list(zip(found.records, found.paths, strict=True)))


def draw(folder: Path = FIGURES) -> None:
    """Write the pictures; UserError without a browser."""
    if why := missing():
        raise UserError(why)
    text = report()
    with opened() as browser:
        for name, (width, height, scheme, drawer) in SHOTS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_content(text)
            page.locator("figure svg").first.wait_for()
            if drawer:
                page.locator("button.open").nth(2).click()
            picture = page.screenshot(animations="disabled")
            if len(picture) > LARGEST:
                raise UserError(f"{name}.png has {len(picture)} bytes, more than {LARGEST}: take a smaller part.")
            write_atomically(folder / f"{name}.png", picture)
            page.close()


if __name__ == "__main__":
    draw()
