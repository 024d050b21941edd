r"""A leaderboard for a paper: one LaTeX table with booktabs for each board, with a caption that says what it shows.

    print(latex(boards))        # \usepackage{booktabs} in the preamble

A difference is bold only where its verdict is better or worse. The caption states n, the interval and the correction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from upcycle_bench.reporting.board import Board, Row, RowHeadline, SeedMean
from upcycle_bench.reporting.columns import rank_cell, score_cell, shown_by, versus

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$",
}  # fmt: skip


def latex(boards: Iterable[Board], metrics: Sequence[str] = ()) -> str:
    """All boards; `metrics`: words in the names of further scores."""
    return "\n\n".join(_table(board, metrics) for board in boards) + "\n"


def escaped(text: str) -> str:
    """Text as LaTeX prints it, on one line."""
    return re.sub(r"[\\{}$&%#_~^<>|\"±]", lambda match: SPECIAL[match[0]], " ".join(text.split()))


def _table(board: Board, metrics: Sequence[str]) -> str:
    names, more = list(board.headlines), shown_by({name for row in board.rows for name in row.scores}, metrics)
    each = (
        ["$n$", *names] if not board.baseline else ["$n$", *(part for name in names for part in (name, "difference"))]
    )
    header = ["rank", "strategy", *each, *more, "FLOPs"]
    lines = [
        [
            rank_cell(row.headlines.get(names[0]) if names else None).replace("-", "--"),
            escaped(row.title),
            str(row.seeds),
            *(cell for name in names for cell in _cells(row, row.headlines.get(name), board)),
            *(escaped(score_cell(row, name)) for name in more),
            "" if ratio is None else rf"{ratio:.2f}$\times$",
        ]
        for row, ratio in zip(board.rows, board.flops_ratios, strict=True)
    ]
    head = [name if name.startswith("$") else escaped(name) for name in header]
    rows = [" & ".join(line) + r" \\" for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_caption(board)}}}",
            rf"\begin{{tabular}}{{rl{'r' * (len(header) - 2)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _cells(row: Row, found: RowHeadline | None, board: Board) -> list[str]:
    """A headline score, and its difference to the reference where the board has one."""
    if not board.baseline:
        return [_mean(found.mean if found else None)]
    difference = _mean(found.difference if found else None, "+")
    if found and found.verdict in ("better", "worse"):
        difference = rf"\textbf{{{difference}}}"
    return [_mean(found.mean if found else None), "--" if row.label == board.baseline else difference]


def _mean(value: SeedMean | None, sign: str = "") -> str:
    if value is None:
        return ""
    number = f"{value.mean:{sign}.4f}".replace("-", "$-$").replace("+", "$+$")
    return number if value.half_width is None else rf"{number} $\pm$ {value.half_width:.4f}"


def _over(board: Board) -> str:
    """What intervals are over."""
    alone = [name for name in board.headlines if name not in board.over_samples]
    if not alone:
        return "seeds and evaluation samples"
    return "seeds" if not board.over_samples else f"seeds and evaluation samples (of {', '.join(alone)}: seeds alone)"


def _caption(board: Board) -> str:
    seeds = sorted({row.seeds for row in board.rows if row.seeds})
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "0"
    directions = ", ".join(
        f"{name} ({'higher' if each.higher_is_better else 'lower'} is better)" for name, each in board.headlines.items()
    )
    sentences = [
        f"Protocol {board.protocol}, {board.division} division: {directions or 'no score'}.",
        f"Means over n = {n} training seeds with 95 % intervals over {_over(board)} (Student's t).",
    ]
    if board.baseline:
        to = versus(board).removeprefix("vs ")
        sentences.append(
            f"Differences to {to} are paired by seed; bold: p < 0.05 in a two-sided test with Holm's "
            "correction over the strategies, for each score."
        )
    if seeds and seeds[0] < 3:
        sentences.append("With fewer than three seeds a row is not ranked.")
    sentences.append("FLOPs: charged ones, relative to the reference.")
    return escaped(" ".join(sentences))
