"""A headless Chromium of the system, for tests and screenshots of the HTML report.

    with opened() as browser:                  # Playwright's; it downloads nothing
        page = browser.new_page()

`make browser` installs it on Debian. UPCYCLE_BENCH_NEED_BROWSER=1, as in CI, makes a missing one a failure.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
NEEDED = "UPCYCLE_BENCH_NEED_BROWSER"


def missing() -> str:
    """Why there is no browser; "" if there is one."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install playwright"
    return "" if _path() else f"none of {', '.join(NAMES)} is on PATH: make browser"


def needed() -> bool:
    """Whether a missing browser is a failure."""
    return os.environ.get(NEEDED, "") not in ("", "0")


@contextmanager
def opened() -> Iterator[Any]:
    """The browser, without a sandbox, which root cannot have."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=_path(), chromium_sandbox=False, args=["--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


def _path() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)
