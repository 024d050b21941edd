"""Leaderboards as one self-contained HTML page: no network, and a content security policy that forbids it.

    text = render(boards, [(record, path), ...])

Without JavaScript it is a page of tables. The script sorts, filters, draws (Observable Plot, `vendor/`) and opens a
drawer for each row. Everything from a record is escaped: by Jinja in the tables and as JSON in a data block, from which
the script makes text nodes only. The same records give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from upcycle_bench.reporting.board import Board
from upcycle_bench.reporting.captions import NOTES
from upcycle_bench.reporting.html.behind import Runs, records_of
from upcycle_bench.reporting.html.data import Publisher, data_of, nothing_published
from upcycle_bench.reporting.html.ranks import rankings_of
from upcycle_bench.reporting.html.sections import section_of
from upcycle_bench.util import strict_json

VENDORED = ("vendor/d3.min.js", "vendor/plot.min.js")
OURS = ("js/dom.js", "js/table.js", "js/drawer.js", "js/charts.js", "js/ranks.js", "js/figures.js", "js/report.js")


def render(boards: Sequence[Board], runs: Runs, published: Publisher = nothing_published) -> str:
    """The page. `runs`: every record of the boards and its path; `published`: what papers report of a row."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    behind, rankings = records_of(boards, runs), rankings_of(boards, runs)
    style = _asset("style.css")
    scripts = [*map(_asset, VENDORED), "\n".join(['"use strict";', *map(_asset, OURS)])]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("template.html")).render(
        policy=_policy(scripts, style),
        style=Markup(style),
        scripts=list(map(Markup, scripts)),
        data=Markup(script_safe(data_of(boards, behind, rankings, published))),
        sections=[section_of(*each) for each in zip(boards, behind, rankings, strict=True)],
        notes=NOTES,
        runs=len(runs),
    )


def script_safe(data: Any) -> str:
    """JSON that can stand in a script element: it holds no `<`, `>` or `&`."""
    text = strict_json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def _policy(scripts: Sequence[str], style: str) -> str:
    """The content security policy: these scripts and this style by their hashes, and nothing else from anywhere."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
