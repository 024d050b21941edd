"""The one error that reaches a user: a single line that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or a missing prerequisite; the command line prints it without a traceback and exits with 2."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """Error for an unknown name: near matches first, then all that exists, then what to do."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f" did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UserError(
        f"unknown {kind} {name!r}:{guess} There are: {', '.join(known) or 'none'}.{' ' + hint if hint else ''}"
    )
