"""Score one model: every suite evaluates it, and a certificate says that the evaluation is sound.

results, certificate = score(suites, root, clip, meter, reporter, digest, file)
scores_of(results), headlines_of(scores), skips_of(results)      # as they stand in a record
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upcycle_bench import record
from upcycle_bench.evaluation.certificate import certify
from upcycle_bench.evaluation.witness import Witness
from upcycle_bench.model.clip import Clip
from upcycle_bench.suite import EvalContext, Suite, SuiteResult
from upcycle_bench.util.errors import PluginError, Unsound, UserError
from upcycle_bench.util.flops import counted_flops
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.uncertainty import of_scores

Scored = tuple[dict[str, SuiteResult], record.CertificatePart | None]


def score(
    suites: Mapping[str, Suite],
    root: Path,
    final: Clip,
    meter: Meter,
    reporter: Reporter,
    digest: str,
    file: Path | None = None,
) -> Scored:
    """The result of each suite on the sets below `root`, and the certificate; Unsound (a UserError) without one.

    `digest`: sha256 of the weights, under which features are cached, or "". `file`: where `final` is saved, from which
    the certificate loads it again; None for weights that are not ours. A suite that fails is skipped, with its reason,
    as long as another one gives a headline score; else its error is raised.
    """
    witness = Witness(final.model.to(meter.device).eval())
    context = EvalContext(
        model=witness.model,
        tokenizer=final.tokenize,
        transform=final.transform,
        root=root,
        device=meter.device,
        weights=digest,
        track=reporter.track,
        on_encoded=witness.on_encoded,
    )
    results: dict[str, SuiteResult] = {}
    errors = []
    with witness, meter.phase("evaluate", count=True), reporter.phase("evaluating"):
        for name, suite in suites.items():
            try:
                results[name] = suite.evaluate(context)
            except Unsound:
                raise
            except Exception as error:  # a suite may raise anything, and the others must still run
                errors.append(error)
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                results[name] = SuiteResult([], {}, skipped={"": reason})
    if errors and not any(made.headline for result in results.values() for made in result.scores):
        raise errors[0]
    with reporter.task("certificate"), counted_flops():  # the same kernels as in the evaluation
        scored = {name: suite for name, suite in suites.items() if results[name].scores}
        return results, certify(witness, scored, context, file)


def scores_of(outcome: Mapping[str, SuiteResult]) -> list[dict[str, Any]]:
    """All scores, as in a record. Headlines are only those of the first suite that has some: suites do not mix."""
    first = next((name for name, result in outcome.items() if any(score.headline for score in result.scores)), "")
    return [
        {"suite": name, **asdict(score), "headline": score.headline if name == first else ""}
        for name, result in outcome.items()
        for score in result.scores
    ]


def headlines_of(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The headline scores of `scores_of`, as in a record: name -> mean of its parts, direction, chance and error.

    Raises PluginError for one whose parts have no common direction.
    """
    found = {}
    for name in dict.fromkeys(score["headline"] for score in scores if score["headline"]):
        parts = [score for score in scores if score["headline"] == name]
        directions = {score["higher_is_better"] for score in parts}
        if len(directions) > 1 or None in directions:
            raise PluginError(f"headline score {name}: all its parts must be higher-is-better, or all lower-is-better")
        chances = [score["chance"] for score in parts]
        found[name] = {
            "value": statistics.fmean(score["value"] for score in parts),
            "higher_is_better": directions.pop(),
            "chance": None if None in chances else statistics.fmean(chances),
            "standard_error": of_scores((part["dataset"], part["metric"], part["standard_error"]) for part in parts),
        }
    return found


def skips_of(outcome: Mapping[str, SuiteResult]) -> dict[str, str]:
    """Suite, or suite/part -> why it did not run, in one line."""
    parts = ((name, part, why) for name, result in outcome.items() for part, why in result.skipped.items())
    return {f"{name}/{part}" if part else name: " ".join(why.split()) for name, part, why in parts}
