"""The one error that reaches a user: a single line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Bad input or a missing prerequisite; the command line prints it without a traceback and exits with 2."""


class PluginError(UserError, ValueError):
    """A plugin broke its contract; one line for its author."""


class Unsound(UserError):
    """An evaluation whose scores cannot be believed (upcycle_bench/evaluation/certificate.py)."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the evaluation is not sound: {why}")


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """Error for an unknown name: near matches first, then all that exists, then what to do."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f": did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    there = (
        f"There are {len(known)}."
        if len(known) > (15 if near else 80)
        else f"There are: {', '.join(known)}."
        if known
        else "There is none."
    )
    return UserError(" ".join(filter(None, [f"unknown {kind} {name!r}{guess}", there, hint])))


def first_problem(error: Any) -> tuple[str, str]:
    """(dotted place or "", what is wrong and what was given) of a pydantic ValidationError's first problem."""
    first = error.errors()[0]
    given = f" (got {first['input']!r})" if isinstance(first["input"], str | int | float) else ""
    return ".".join(map(str, first["loc"])), f"{plain(first['msg'])}{given}"


def plain(message: str) -> str:
    """Without pydantic's mark of a ValueError, which typer's messages have too."""
    return message.replace("Value error, ", "")
