"""Whether records that others sent can be what they say. `CHECKS` has a row for each check; docs/submit.md shows them.

    found = validate([Path("results")], Here(load_registry()))
    found.findings                       # [Finding(path, "scores", "zero-shot/digits-test/acc1 is 0.99, ...")]
    found.of(path), found.passed_over    # of one record; foreign and hidden files, each with the reason

A record that was made up as a whole, outcomes and all, can pass: a hash says that nothing was changed, not that it was
measured. That is what `reproduce` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upcycle_bench.reporting import (
    checks_certificate,
    checks_copies,
    checks_cost,
    checks_curve,
    checks_identity,
    checks_scores,
    checks_tuned,
)
from upcycle_bench.reporting.sent import Finding, Here, Sent, Unchecked, Warned, gather, open_sent
from upcycle_bench.util.errors import UserError, one_line

KINDS: dict[type[str], Literal["unchecked", "warning"]] = {Unchecked: "unchecked", Warned: "warning"}
LISTS = {"wrong": "wrong", "warnings": "warning", "unchecked": "unchecked"}  # in JSON


OF_OUTCOMES = ("outcomes", "samples", "scores", "errors")  # checks that say nothing without them


@dataclass(frozen=True)
class Check:
    """A check: what it asks, and the function that asks it of one record (None: it is asked as the file is read)."""

    what: str
    of: Callable[[Sent, Here], Iterator[str]] | None = None


CHECKS = {
    "strict-json": Check("the record is JSON: no NaN, no number beyond float64, no name twice"),
    "schema": Check("it has today's schema, and what it says of itself agrees"),
    "outcomes-hash": Check("the `.npz` is there and has the sha256 of the record"),
    "outcomes": Check(
        "the outcomes are finite numbers; ranks, log ranks and answers at k agree", checks_scores.outcomes
    ),
    "samples": Check("there are as many outcomes as a score has samples", checks_scores.samples),
    "scores": Check("each score is the mean of its outcomes, of its strata or of its sets", checks_scores.scores),
    "errors": Check("standard errors and intervals are those of the outcomes", checks_scores.errors),
    "headlines": Check("headline scores, their chance and error come from their parts", checks_scores.headlines),
    "ranges": Check("no rate outside of 0 to 1, no score outside of its interval", checks_scores.ranges),
    "chance": Check("the chance levels of a set agree on the number of answers", checks_scores.chance),
    "protocol": Check("the settings are those of the protocol and its overrides", checks_identity.protocol),
    "strategy": Check("label, status, MoE settings and cost are those of the strategy", checks_identity.strategy),
    "training-fingerprint": Check("protocol, data, dense model and ranks give it", checks_identity.training),
    "suite-fingerprint": Check("settings and evaluation sets give it, where the sets are here", checks_identity.suites),
    "tuned": Check(
        "a tuned row follows its protocol's rule, is its strategy's only one, and its tuning runs say so",
        checks_tuned.tuned,
    ),
    "hashes": Check("a run that ended names its weights and its dense model", checks_identity.hashes),
    "run-id": Check("strategy, options, steps, seeds and fingerprint give it", checks_identity.run_id),
    "certificate": Check("there is one, within its own limits", checks_certificate.certificate),
    "cost": Check("steps times batch are the pairs; FLOPs, seconds and speed can be", checks_cost.cost),
    "training": Check("the training has the protocol's steps, and about their FLOPs", checks_cost.training),
    "times": Check("not made in the future; sessions follow each other", checks_cost.times),
    "metrics": Check("the lines of metrics are of this training: steps, rates, losses, speed", checks_cost.metrics),
    "curve": Check(
        "the held-out scores can be; those of `dense` and `sparse-upcycling` are where others' are (a warning)",
        checks_curve.curve,
    ),
    "copies": Check("no run stands here twice"),
    "same-results": Check("no two runs have the same weights, outcomes or metrics"),
}

# Those that look at several records.
OVER_ALL = {
    "tuned": checks_tuned.over_all,
    "copies": checks_copies.copies,
    "same-results": checks_copies.same_results,
}


@dataclass(frozen=True)
class Validation:
    """What was found: the records, all findings, and the files that were passed over, each with the reason."""

    records: list[Path]
    findings: list[Finding]
    passed_over: dict[Path, str]
    sent: dict[Path, Sent]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.wrong for finding in self.findings)

    def of(self, path: Path) -> list[Finding]:
        """The findings of one record."""
        return [finding for finding in self.findings if finding.path == path]

    def _said(self, path: Path, kind: str) -> list[dict[str, str]]:
        return [{"check": each.check, "what": each.what} for each in self.of(path) if each.kind == kind]

    def facts(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "sound": self.sound,
            "records": [
                {
                    "path": str(path),
                    **{name: self._said(path, kind) for name, kind in LISTS.items()},
                }
                for path in self.records
            ],
            "passed_over": {str(path): why for path, why in self.passed_over.items()},
        }


def validate(paths: Sequence[Path], here: Here) -> Validation:
    """All checks of the records below `paths`. UserError for a path that does not exist, and without any record."""
    records, passed_over = gather(paths)
    if not records:
        others = f"; {len(passed_over):,} other files" if passed_over else ""
        raise UserError(f"no records below {', '.join(map(str, paths))}{others}; name a folder that has some.")
    found: list[Finding] = []
    sent: dict[Path, Sent] = {}
    for path in records:
        one, findings = open_sent(path)
        found += findings
        if one is not None:
            sent[path] = one
            lost = any(finding.check == "outcomes-hash" for finding in findings)  # it is said, once
            for name, check in CHECKS.items():
                if not (lost and name in OF_OUTCOMES):
                    found += _findings(name, check, one, here)
    every = list(sent.values())
    for name, over_all in OVER_ALL.items():
        found += [Finding(path, name, str(what), KINDS.get(type(what), "wrong")) for path, what in over_all(every)]
    place = {path: number for number, path in enumerate(records)}
    found.sort(key=lambda finding: place[finding.path])
    return Validation(records, found, passed_over, sent)


def _findings(name: str, check: Check, sent: Sent, here: Here) -> list[Finding]:
    """What one check says. What a stranger wrote may break a check in any way: that is wrong, too, and is said."""
    found: list[Finding] = []
    try:
        for what in check.of(sent, here) if check.of else ():
            found.append(Finding(sent.path, name, str(what), KINDS.get(type(what), "wrong")))
    except Exception as error:
        what = f"what the record holds breaks this check ({type(error).__name__}: {one_line(error)})"
        found.append(Finding(sent.path, name, what))
    return found
