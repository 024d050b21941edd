"""Errors for the user: a single line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Bad input or a missing prerequisite. The command line prints it without a traceback and exits with `status`."""

    status = 2


class DivergedError(UserError, FloatingPointError):
    """A training whose loss is no longer a finite number. `rank`: the first process on which it is not."""

    status = 1

    def __init__(self, message: str, rank: int = 0) -> None:
        super().__init__(message)
        self.rank = rank


class PluginError(UserError, ValueError):
    """A plugin broke its contract; the line is for its author."""


class Unsound(UserError):
    """An evaluation whose scores cannot be believed (upcycle_bench/evaluation/certificate.py)."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the evaluation is not sound: {why}")


def one_line(error: BaseException, limit: int = 400) -> str:
    """The beginning of an error's message, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < limit else text[:limit] + " ..."


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """Error for an unknown name: similar names, then all known names or their number, then the hint."""
    known = sorted(known)
    similar = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f": did you mean {' or '.join(repr(each) for each in similar)}?" if similar else "."
    if not known:
        choice = "There is none."
    elif len(known) > (15 if similar else 80):
        choice = f"There are {len(known)}."
    else:
        choice = f"There are: {', '.join(known)}."
    return UserError(" ".join(filter(None, [f"unknown {kind} {name!r}{guess}", choice, hint])))


def first_problem(error: Any) -> tuple[str, str]:
    """First problem of a pydantic ValidationError: (dotted place, "" for the whole; what is wrong and was given)."""
    first = error.errors()[0]
    given = f" (got {first['input']!r})" if isinstance(first["input"], str | int | float) else ""
    return ".".join(map(str, first["loc"])), f"{plain(first['msg'])}{given}"


def plain(message: str) -> str:
    """The message without "Value error, ", which pydantic puts before the text of a ValueError of ours."""
    return message.replace("Value error, ", "")
