"""Tables for papers: bold where resolved, captions that say what they show, and names that LaTeX would read."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.records import make_record
from tests.reporting.test_leaderboard import failure, runs, two_headlines
from upcycle_bench.reporting.formats import render
from upcycle_bench.reporting.latex import escaped
from upcycle_bench.reporting.leaderboard import build


def test_only_what_is_resolved_is_bold() -> None:
    base = {0: 2.0, 1: 2.1, 2: 2.2, 3: 1.9}
    made = runs("sparse-upcycling", base) + runs("new", {seed: value + 1 + seed / 100 for seed, value in base.items()})
    made += [*runs("unsure", {0: 9.0, 1: -4.0, 2: 8.0, 3: -3.0}), failure("zzz")]
    text = render(build(made), "latex")
    bold = re.findall(r"\\textbf\{([^}]*)\}", text)
    assert bold == [r"$+$1.0150 $\pm$ 0.0205"]  # sd 0.01291, by 2, times 3.182
    assert r"unsure & 4 & 2.5000 $\pm$" in text and "-- & zzz & 0" in text
    assert r"n = 0 to 4" not in text and "n = 4 training seeds with 95 \\% intervals over seeds (Student's t)" in text
    assert "paired by seed; bold: p \\textless{} 0.05 in a two-sided test with Holm's correction" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    header, *rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 4 and {line.count("&") for line in (header, *rows)} == {5}


def test_few_seeds_are_said_and_directions() -> None:
    made = two_headlines("sparse-upcycling", {0: 2.0, 1: 3.0}, {0: 4.0, 1: 6.0})
    text = render(build(made), "latex")
    assert "in-distribution (lower is better), shift (lower is better)" in text
    assert "With fewer than three seeds a row is not ranked." in text


NAMES = ["<script>", "a_b|c$d%e#f&g~h^i", "back\\slash{brace}", 'quo"te', "x" * 200, "two\nlines ± half"]


def test_names_that_latex_would_read_are_escaped() -> None:
    text = render(build([make_record(name) for name in NAMES]), "latex")
    plain = re.sub(r"\\[a-z]+(\{\})?|\\[{}$&%#_]", "", text)
    assert not re.search(r"[<>|~^#%_\"±]", plain.replace("$n$", ""))
    assert escaped("a_b & 5 % \\ {x}\n±") == r"a\_b \& 5 \% \textbackslash{} \{x\} $\pm$"


def test_it_compiles(tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("there is no pdflatex on this machine")
    body = render(build([make_record(name) for name in NAMES]), "latex")
    (tmp_path / "t.tex").write_text(
        r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}"
        + body
        + r"\end{document}"
    )
    done = subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
