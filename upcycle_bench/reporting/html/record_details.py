"""What the page tells of one record: how it was made, what it cost, its hashes, and its training curve.

    details = RecordDetails(points=200, receipts=True)
    details.of(record, path, "counts")        # what the drawer shows of it, for JSON
    details.shared                            # environments and the like, which many records have in common, once

Numbers have five digits; the record has them all, and its path stands beside them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upcycle_bench.record import Record
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError

LAYER = ("function_drift", "expert_cosine", "router_entropy", "load")  # of a receipt's layers, what has a column


class RecordDetails:
    """Details of records, for JSON. `points`: of a curve, at most; `receipts`: whole ones, or only their layers."""

    def __init__(self, points: int, receipts: bool) -> None:
        self._points, self._receipts = points, receipts
        self._places: dict[str, int] = {}
        self.shared: list[Any] = []

    def of(self, record: Record, path: Path, counts: str) -> dict[str, Any]:
        """What the drawer shows of the record at `path`. `counts`: whether it does, in words."""
        cost, certificate, tuned = record.cost, record.certificate, record.strategy.tuned
        found: dict[str, Any] = {
            "path": f"{path.absolute().parent.name}/{path.name}",
            "run": record.run_id,
            "created": record.created,
            "counts": counts,
            "reason": record.reason,
            "seeds": [record.seeds.init, record.seeds.train],
            "command": shlex.join(record.command),
            "hashes": record.hashes.model_dump(),
            "headlines": {name: [each.value, each.standard_error] for name, each in record.headlines.items()},
            "certificate": certificate
            and f"{certificate.predictions} predictions made again {len(certificate.repeats)} times, "
            f"{len(certificate.controls)} controls",
            "strategy": self._share(record.strategy.model_dump(mode="json", exclude={"label"})),
            "environment": self._share(record.environment),
            "sessions": [self._share(each.model_dump(mode="json")) for each in record.sessions or ()],
            "skipped": record.skipped,
        }
        if cost:
            found["cost"] = self._share(cost.model_dump(exclude={"phases", "tokens_dropped", "samples_per_second"}))
            found["phases"] = {name: list(phase.model_dump().values()) for name, phase in cost.phases.items()}
            if tuned:  # charged, too; memory, pairs and steps stand in the records of its runs
                found["phases"]["tuning"] = [tuned.seconds, tuned.flops, *[None] * 4]
        if self._receipts:
            found |= {"receipt": record.receipt, "diagnostics": record.diagnostics}
        return rounded({key: value for key, value in found.items() if value not in (None, {}, [])})

    def curve(self, path: Path) -> list[Any] | None:
        """The place of its steps in `shared`, and the training loss at each; None for a run that did not train."""
        lines = _metrics(path, self._points)
        values = [(each["step"], each.get("contrastive", each.get("loss"))) for each in lines if "step" in each]
        known = [(step, loss) for step, loss in values if loss is not None]
        if len(known) < 2:
            return None
        return [self._share([step for step, _ in known]), rounded([loss for _, loss in known])]

    def held_out(self, record: Record) -> list[Any] | None:
        """The same of the scores of held-out pairs."""
        if record.validation is None:
            return None
        steps, scores = zip(*thinned(record.validation.points, self._points), strict=True)
        return [self._share(list(steps)), rounded(list(scores))]

    def _share(self, value: Any) -> int:
        """The place of the value in `shared`, where it stands once."""
        text = strict_json.dumps(value, sort_keys=True)
        if text not in self._places:
            self._places[text] = len(self.shared)
            self.shared.append(rounded(value))
        return self._places[text]


def layer_means(part: dict[str, Any] | None) -> dict[str, float]:
    """Of a receipt or of diagnostics: `LAYER`, as means over layers; of a load, the share of the busiest expert."""
    layers = (part or {}).get("layers")
    found: dict[str, list[float]] = {}
    for layer in layers.values() if isinstance(layers, dict) else ():
        for name in LAYER:
            value = layer.get(name) if isinstance(layer, dict) else None
            value = max(value, default=None) if isinstance(value, list) else value
            if isinstance(value, int | float):
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def thinned(values: Sequence[Any], points: int) -> list[Any]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= points:
        return list(values)
    return [values[round(number * (len(values) - 1) / (points - 1))] for number in range(points)]


def rounded(value: Any) -> Any:
    """The same tree with floats of five digits."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _metrics(path: Path, points: int) -> list[dict[str, Any]]:
    """At most so many of the training metrics beside a record. UserError for one of them that is not JSON."""
    beside = path.with_suffix(".jsonl")
    if not beside.is_file():
        return []
    found = []
    lines = enumerate(beside.read_bytes().split(b"\n"), start=1)
    known = [(number, line) for number, line in lines if line.strip()]
    for number, line in thinned(known, points):  # before they are parsed, which takes most of the time
        try:
            tree = strict_json.loads(line)
            if not isinstance(tree, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"training metrics {beside}, line {number}: {error}; restore the file, or move it away."
            ) from None
        found.append(tree)
    return found
