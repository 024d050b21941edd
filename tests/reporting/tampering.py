"""Records as a cheat, or an accident, would leave them, each with the check that has to catch it: the rows of TAMPERED.

    folder = fresh(tmp_path)                    # copies of results/smoke, and of one record of results/lab
    TAMPERED[0].make(folder)                    # changes a file or two

Who changes outcomes gives the record their new hash, so that the hash alone does not catch it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol

RESULTS = Path(__file__).parents[2] / "results"
BASE, OTHER, LAB = "cluster-aware-i0-t0", "sparse-upcycling-i0-t0", "lab-sparse-upcycling"


def fresh(folder: Path) -> Path:
    """Copies of sound records: two of `smoke`, and one of `lab` whose names begin `lab-`."""
    sources = [("smoke", BASE, ""), ("smoke", OTHER, ""), ("lab", "sparse-upcycling-i0-t0", "lab-")]
    for protocol, start, prefix in sources:
        for file in (RESULTS / protocol).glob(f"{start}-*"):
            shutil.copy(file, folder / f"{prefix}{file.name}")
    return folder


class Files:
    """The files of the record in a folder whose name begins so."""

    def __init__(self, folder: Path, start: str = BASE) -> None:
        (self.json,) = folder.glob(f"{start}-*.json")
        self.npz, self.lines = self.json.with_suffix(".npz"), self.json.with_suffix(".jsonl")
        self.tree: dict[str, Any] = json.loads(self.json.read_text())

    def write(self) -> None:
        self.json.write_text(json.dumps(self.tree, indent=2))

    def score(self, name: str) -> dict[str, Any]:
        """The score `DATASET/METRIC`."""
        (found,) = [each for each in self.tree["scores"] if f"{each['dataset']}/{each['metric']}" == name]
        return found

    def headline(self, name: str = "in-distribution") -> None:
        """Make the headline score the mean of its parts again."""
        parts = [each["value"] for each in self.tree["scores"] if each["headline"] == name]
        self.tree["headlines"][name]["value"] = sum(parts) / len(parts)

    def outcomes(self, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Change the arrays, and give the record their hash."""
        with np.load(self.npz) as loaded:
            arrays = dict(loaded)
        change(arrays)
        np.savez(self.npz, **arrays)
        self.tree["hashes"]["outcomes"] = hashlib.sha256(self.npz.read_bytes()).hexdigest()
        self.write()


def without(folder: Path, name: str) -> None:
    """Leave out the arrays whose names end so, all of them for ""; the scores stay."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        for key in [key for key in arrays if key.endswith(name)]:
            del arrays[key]

    Files(folder).outcomes(change)


@dataclass(frozen=True)
class Tampering:
    """What was done to a record, and the check that catches it."""

    what: str
    check: str
    make: Callable[[Path], None]


def text(old: str, new: str) -> Callable[[Path], None]:
    """Replace the first `old` in the text of the record."""

    def make(folder: Path) -> None:
        files = Files(folder)
        assert old in files.json.read_text()
        files.json.write_text(files.json.read_text().replace(old, new, 1))

    return make


def at(path: str, value: Any, start: str = BASE) -> Callable[[Path], None]:
    """Set the value at a dotted path of the record; a function makes it of the old one."""

    def make(folder: Path) -> None:
        files, (*parents, leaf) = Files(folder, start), path.split(".")
        part: Any = files.tree
        for parent in parents:
            part = part[int(parent)] if isinstance(part, list) else part[parent]
        place = int(leaf) if isinstance(part, list) else leaf
        part[place] = value(part[place]) if callable(value) else value
        files.write()

    return make


def later(created: str) -> str:
    """Two seconds later."""
    return (datetime.strptime(created, "%Y-%m-%dT%H:%M:%SZ") + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%SZ")


def without_phase(name: str) -> Callable[[Path], None]:
    """Leave out the cost of a phase."""
    return at("cost.phases", lambda phases: {key: value for key, value in phases.items() if key != name})


def of_score(name: str, field: str, value: Any, start: str = BASE) -> Callable[[Path], None]:
    """Set a field of one score, and the headline score by it."""

    def make(folder: Path) -> None:
        files = Files(folder, start)
        found = files.score(name)
        found[field] = value(found[field]) if callable(value) else value
        for headline in files.tree["headlines"]:
            files.headline(headline)
        files.write()

    return make


def of_outcomes(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """Change the outcomes, and their hash in the record."""
    return lambda folder: Files(folder).outcomes(change)


def of_lines(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Path], None]:
    """Change the lines of metrics."""

    def make(folder: Path) -> None:
        files = Files(folder)
        lines = [json.loads(line) for line in files.lines.read_text().splitlines()]
        change(lines)
        files.lines.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return make


def other_outcomes(folder: Path) -> None:
    shutil.copy(Files(folder, OTHER).npz, Files(folder).npz)


def ranks_raised(arrays: dict[str, np.ndarray]) -> None:
    arrays["zero-shot/digits-test/rank"][:] = 0


def not_a_number(arrays: dict[str, np.ndarray]) -> None:
    arrays["zero-shot/digits-test/log_likelihood"][7] = np.nan


def half(arrays: dict[str, np.ndarray]) -> None:
    for name in [name for name in arrays if "digits-test" in name]:
        arrays[name] = arrays[name][::2]


def weak_part_dropped(folder: Path) -> None:
    files = Files(folder)
    files.score("digits-retrieval/text_retrieval_log_rank")["headline"] = ""
    files.score("digits-retrieval/image_retrieval_log_rank")["headline"] = ""
    files.headline()
    files.write()


def fewer_steps(folder: Path) -> None:
    files = Files(folder)
    files.tree["cost"]["phases"]["train"] |= {"steps": 50, "samples": 3200}
    files.tree["cost"]["samples"] = 3200
    files.write()


def gap_between_sessions(folder: Path) -> None:
    files = Files(folder)
    usual = {"started": files.tree["created"], "hosts": ["a"], "world_size": 1, "ep_size": 1, "device": "cpu"}
    files.tree["sessions"] = [
        usual | {"versions": {}, "first_step": 0, "last_step": 40},
        usual | {"versions": {}, "first_step": 60, "last_step": 100},
    ]
    files.write()


def copied(folder: Path) -> None:
    for file in folder.glob(f"{BASE}-*"):
        shutil.copy(file, folder / f"another-name{file.suffix}")


def as_another_seed(folder: Path) -> None:
    copied(folder)
    files = Files(folder, "another")
    files.tree["seeds"] = {"init": 5, "train": 5}
    files.tree["created"] = later(files.tree["created"])
    files.write()


def as_another_strategy(folder: Path) -> None:
    """The other run's files under this one's name, strategy and id."""
    files, other = Files(folder), Files(folder, OTHER)
    other.tree |= {"strategy": files.tree["strategy"], "run_id": files.tree["run_id"]}
    shutil.copy(other.npz, files.npz)
    shutil.copy(other.lines, files.lines)
    files.json.write_text(json.dumps(other.tree))


def metrics_of_another(folder: Path) -> None:
    shutil.copy(Files(folder, OTHER).lines, Files(folder).lines)


def as_tuned(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """The record as a tuned row whose defaults won, by the rule of `smoke`; then changed."""

    def make(folder: Path) -> None:
        files = Files(folder)
        strategy, resolved = files.tree["strategy"], files.tree["protocol"]["resolved"]
        resolved["tuning"] = load_protocol(load_registry().protocols["smoke"].target).model_dump(mode="json")["tuning"]
        rule = {key: value for key, value in resolved["tuning"].items() if key != "candidates"}
        usual, other = strategy["config"], strategy["config"] | {"tau": 0.8}
        candidates = [(strategy["label"], usual, 0.04), (f"{strategy['label']}[tau=0.8]", other, 0.05)]
        strategy["label"] += "[tuned]"
        strategy["tuned"] = rule | {
            "higher_is_better": False,
            "candidates": [
                {
                    "label": label,
                    "config": config,
                    "runs": [
                        {"run_id": f"{value}-{seed}".replace("0.", "tuning"), "seed": seed}
                        | {"value": value, "flops": 10**11, "seconds": 9.0}
                        for seed in rule["seeds"]
                    ],
                }
                for label, config, value in candidates
            ],
        }
        change(files.tree)
        files.write()

    return make


def worse_candidate(tree: dict[str, Any]) -> None:
    """The other one was better."""
    for run in tree["strategy"]["tuned"]["candidates"][1]["runs"]:
        run["value"] = 0.01


SCORE, TRAIN = "digits-test/acc1", "cost.phases.train"
TAMPERED = [
    Tampering("a score is NaN", "strict-json", text('"value": 0.', '"value": NaN, "x": 0.')),
    Tampering("`status` stands twice", "strict-json", text('"status"', '"status": "failed",\n"status"')),
    Tampering("a field that no record has", "schema", text('"status"', '"verified": true,\n"status"')),
    Tampering("an older schema", "schema", at("schema_version", 1)),
    Tampering("no rank at all", "schema", at("cost.world_size", 0)),
    Tampering("a better headline score, its parts as they were", "schema", at("headlines.in-distribution.value", 0.01)),
    Tampering("overrides in the closed division", "schema", at("protocol.overrides", ["train.lr_factor=2.0"])),
    Tampering("the outcomes of another run", "outcomes-hash", other_outcomes),
    Tampering("a file of outcomes without any", "scores", lambda folder: without(folder, "")),
    Tampering("outcomes without the ranks of a set", "scores", lambda folder: without(folder, "rank")),
    Tampering("no outcomes", "outcomes-hash", lambda folder: Files(folder).npz.unlink()),
    Tampering("an outcome is NaN", "outcomes", of_outcomes(not_a_number)),
    Tampering("all ranks are first, the rest as it was", "outcomes", of_outcomes(ranks_raised)),
    Tampering("every second outcome", "samples", of_outcomes(half)),
    Tampering("an accuracy raised by one point", "scores", of_score(SCORE, "value", lambda value: value + 0.01)),
    Tampering("a log rank halved, and its headline", "scores", of_score("digits-test/log_rank", "value", 0.024)),
    Tampering("a stratum raised", "scores", of_score("validation/acc1[unseen-caption]", "value", 0.9, LAB)),
    Tampering("a mean over sets raised", "scores", of_score("average/shift/acc1", "value", 0.9, LAB)),
    Tampering("a standard error halved", "errors", of_score(SCORE, "standard_error", lambda value: value / 2)),
    Tampering(
        "the error of the headline score halved", "headlines", at("headlines.in-distribution.standard_error", 0.01)
    ),
    Tampering("the weaker parts left out of the headline score", "headlines", weak_part_dropped),
    Tampering("a mean recall above 1", "ranges", of_score("digits-test/mean_per_class_recall", "value", 1.2)),
    Tampering("a chance level lowered", "chance", of_score("digits-test/log_likelihood", "chance", -3.0)),
    Tampering(
        "another learning rate under the protocol's name", "protocol", at("protocol.resolved.train.lr_factor", 2.0)
    ),
    Tampering("an open run without a reason", "protocol", at("protocol.division", "open")),
    Tampering("the label of an option that was not set", "strategy", at("strategy.label", "cluster-aware[tau=0.8]")),
    Tampering("a reconstruction that says it is published as it is", "strategy", at("strategy.reconstructed", [])),
    Tampering("the hash of other data", "training-fingerprint", at("hashes.data", "0" * 64, LAB)),
    Tampering(
        "the fingerprint of another table", "training-fingerprint", at("protocol.training_fingerprint", "a" * 16, LAB)
    ),
    Tampering(
        "the fingerprint of other evaluation sets",
        "suite-fingerprint",
        at("protocol.suite_fingerprints.zero-shot", "b" * 16),
    ),
    Tampering("other seeds", "run-id", at("seeds", {"init": 3, "train": 3})),
    Tampering("another option than the run's", "run-id", at("strategy.config.tau", 0.95)),
    Tampering("a tuned row whose options were not the best", "tuned", as_tuned(worse_candidate)),
    Tampering("no hash of the weights", "hashes", at("hashes.weights", None)),
    Tampering("no certificate", "certificate", at("certificate", None)),
    Tampering("shuffled labels far above chance", "certificate", at("certificate.controls.0.z", 6.5)),
    Tampering("predictions that changed without a cause", "certificate", at("certificate.repeats.0.differing", 1)),
    Tampering("fewer pairs than steps times batch", "cost", at("cost.samples", 640)),
    Tampering("a training without FLOPs", "cost", at(f"{TRAIN}.flops", 0)),
    Tampering("a training in a microsecond", "cost", at(f"{TRAIN}.seconds", 1e-6)),
    Tampering("half the steps", "training", fewer_steps),
    Tampering("a tenth of the FLOPs", "training", at(f"{TRAIN}.flops", lambda value: value // 10)),
    Tampering("made in the future", "times", at("created", "2126-01-01T00:00:00Z")),
    Tampering("steps that no session made", "times", gap_between_sessions),
    Tampering("no lines of metrics", "metrics", lambda folder: Files(folder).lines.unlink()),
    Tampering("a lower loss than its terms", "metrics", of_lines(lambda lines: lines[3].update(loss=0.5))),
    Tampering(
        "another learning rate than the schedule's",
        "metrics",
        of_lines(lambda lines: lines[3].update(learning_rate=0.1)),
    ),
    Tampering("a faster training than its metrics", "metrics", at("cost.samples_per_second", 9000.0)),
    Tampering("a held-out score better than the best", "curve", at("validation.points.3.1", -0.5)),
    Tampering("a curve that ends before the training", "curve", at("validation.points", lambda points: points[:-1])),
    Tampering("a curve without the point that was bad", "curve", at("validation.points", lambda p: [*p[:2], *p[3:]])),
    Tampering("a curve with a point at another step", "curve", at("validation.points.2.0", 35)),
    Tampering("a curve without its cost", "curve", without_phase("validate")),
    Tampering("a curve of other pairs", "curve", at("validation.set", "digits-test")),
    Tampering("the same run under another file name", "copies", copied),
    Tampering("the same run under other seeds", "same-results", as_another_seed),
    Tampering("another strategy's run under this name", "same-results", as_another_strategy),
    Tampering("another run's metrics", "same-results", metrics_of_another),
]
