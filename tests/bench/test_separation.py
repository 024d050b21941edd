"""The table of candidate scores: differences to the baseline and their t, by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench.separation import CONTROLS, main, paired, separation
from tests.records import make_record, score
from upcycle_bench.record import write


def test_paired_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, t = 2 / (1 / sqrt(3)) = 3.46. Seed 9 has no partner.
    assert paired({0: 2.0, 1: 4.0, 2: 6.0, 9: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0}) == "+2.0000, t 3.5"
    assert paired({0: 2.0}, {0: 2.5}) == "-0.5000 (n=1)"
    assert paired({1: 2.0}, {0: 2.5}) == ""


def test_every_candidate_is_turned_so_that_more_is_better(tmp_path: Path) -> None:
    """The control's right answers are one place behind the baseline's for every query."""
    for label, behind in (("sparse-upcycling", 0), ("dense", 1), ("cluster-aware", 5)):
        rank_Q = np.array([0, 4, 9]) + behind
        arrays = {
            "zero-shot/a/rank": rank_Q,
            "zero-shot/a/log_rank": np.log1p(rank_Q),
            "zero-shot/a/log_likelihood": -np.log1p(rank_Q),
        }
        parts: list[dict[str, Any]] = [score("a", "log_rank", 1.0, headline="shift", lower=True)]
        write(make_record(label, scores=parts), arrays, tmp_path)
    table = separation(tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    found = {name: dense for name, dense, _ in lines}
    log = (np.log(2) + np.log(6 / 5) + np.log(11 / 10)) / 3
    reciprocal = (1 / 2 - 1 + 1 / 6 - 1 / 5 + 1 / 11 - 1 / 10) / 3
    assert found == {
        "shift: log-likelihood": f"{-log:+.4f} (n=1)",
        "shift: minus log rank": f"{-log:+.4f} (n=1)",
        "shift: mean reciprocal rank": f"{reciprocal:+.4f} (n=1)",
        "shift: top-1": "-0.3333 (n=1)",
        "shift: top-5": "-0.3333 (n=1)",
    }
    assert all(cell == "" for _, _, cell in lines)  # no record of the other control
    assert CONTROLS == ("dense", "drop-upcycling[ratio=0.75]")


def test_the_command_ends_bad_input_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^error: no records at .*nowhere") as nowhere:
        main(tmp_path / "nowhere")
    write(make_record("cluster-aware"), None, tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .*no run of sparse-upcycling, dense") as other:
        main(tmp_path)
    assert all(len(str(caught.value).splitlines()) == 1 for caught in (nowhere, other))
    assert capsys.readouterr().out == ""
