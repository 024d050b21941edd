"""Records from files and folders: each once, and what is passed over is named.

found = collect([Path("results/lab"), Path("theirs")])
found.records, found.passed_over, found.outcomes(record)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_bench import record
from upcycle_bench.record import Record
from upcycle_bench.util.errors import UserError, unknown

if TYPE_CHECKING:
    from upcycle_bench.reporting.sent import Here


@dataclass
class Collected:
    """`paths`: of each record that counts, its file, in the order of the records. `passed_over`: others, and why.

    without: records whose outcomes could not be read, and why.
    """

    records: list[Record] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    passed_over: dict[Path, str] = field(default_factory=dict)
    without: dict[Path, str] = field(default_factory=dict)
    _places: dict[int, int] = field(default_factory=dict)

    def outcomes(self, made: Record) -> Mapping[str, Any]:
        """The outcomes of a collected record's scores, by suite/dataset/metric (`drawn.Outcomes`).

        None, and `without` says why, where its file is missing or another one, or where a suite is not here.
        """
        path = self._path_of(made)
        try:
            found = record.read_outcomes(path, made.hashes.outcomes)
            arrays = {name: each for name, each in found.items() if each.dtype.kind in "biuf"}  # others are no numbers
            return arrays if _named_by_metric(made, arrays) else self._numbers_of(path, made, arrays)
        except UserError as error:
            self.without[path] = str(error)
            return {}

    def _numbers_of(self, path: Path, made: Record, arrays: dict[str, Any]) -> Mapping[str, Any]:
        """As the suites say it, which import torch."""
        from upcycle_bench.reporting.sampled_scores import numbers_of
        from upcycle_bench.reporting.sent import Sent

        return numbers_of(Sent(path, made, b"", arrays, None, None), self._here)

    @cached_property
    def _here(self) -> Here:
        """The suites, which alone know of which outcomes a score is the mean."""
        from upcycle_bench.planning.registry import load_registry
        from upcycle_bench.reporting.sent import Here

        return Here(load_registry())

    def _path_of(self, made: Record) -> Path:
        if len(self._places) < len(self.records):
            self._places = {id(each): number for number, each in enumerate(self.records)}
        return self.paths[self._places[id(made)]]

    def only(self, protocol: str | None) -> Collected:
        """Those of a protocol, or all; UserError for one that no record has."""
        if protocol is None:
            return self
        known = {made.protocol.name for made in self.records}
        if protocol not in known:
            raise unknown("protocol of these records", protocol, known)
        kept = [number for number, made in enumerate(self.records) if made.protocol.name == protocol]
        return Collected([self.records[k] for k in kept], [self.paths[k] for k in kept], self.passed_over)


def _named_by_metric(made: Record, arrays: Mapping[str, Any]) -> bool:
    """Whether outcomes have the names of the headline scores, as `Suite.sampled` has it by default, or there are none.

    Then no suite is asked, which saves seconds, and its plugin need not be here. Means are compared with the scores.
    """
    parts = [f"{s.suite}/{s.dataset}/{s.metric}" for s in made.scores if s.headline]
    return not arrays or all(name in arrays and arrays[name].ndim == 1 for name in parts)


def collect(places: Iterable[Path]) -> Collected:
    """The records of these files, and of all files below these folders; of copies the first counts.

    Hidden files, files that are no records, and records of other schema versions are passed over in folders. Raises
    UserError for a place that is not there, for a file that was named and is no record, and where nothing is left.
    """
    found, places = Collected(), list(places)
    copies: dict[tuple[str, str, str], Path] = {}
    seen: set[Path] = set()
    for place in places:
        if not place.exists():
            raise UserError(f"no records at {place}: there is no such file or folder.")
        for path in [place] if place.is_file() else sorted(place.rglob("*.json")):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            if any(part.startswith(".") for part in path.relative_to(place).parts):
                found.passed_over[path] = "it is hidden"
                continue
            try:
                made = record.read(path)
            except UserError as error:
                if path == place:
                    raise
                found.passed_over[path] = str(error)
                continue
            name = (made.run_id, made.created, made.model_dump_json())
            if (first := copies.setdefault(name, path)) != path:
                found.passed_over[path] = f"it is a copy of {first}"
                continue
            found.records.append(made)
            found.paths.append(path)
    if not found.records:
        where = ", ".join(map(str, places))
        for path, why in found.passed_over.items():
            more = f"; so are {len(found.passed_over) - 1:,} more files" if len(found.passed_over) > 1 else ""
            raise UserError(f"no records below {where}: {path.name} is passed over ({why.rstrip('.')}){more}.")
        raise UserError(f"no records below {where}; make one with: upcycle-bench run --strategy cluster-aware")
    return found
