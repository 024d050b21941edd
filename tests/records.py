"""Records for tests: a valid one, its scores, and the headline scores that belong to them."""

from typing import Any

from upcycle_bench.record import Record


def make_record(
    label: str = "dense", init: int = 0, train: int = 0, value: float | None = 0.5, **changes: Any
) -> Record:
    """A valid record; `changes` are top-level keys, or parts to be merged (`protocol={"name": "lab"}`).

    `value`: of its only score, or None for no scores. The headlines are the means of the scores that name them.
    """
    name = label.partition("[")[0]
    scores = [] if value is None else [score("digits-test", "log_likelihood", value, headline="in-distribution")]
    tree: dict[str, Any] = {
        "schema_version": 2,
        "run_id": f"12345678-i{init}-t{train}",
        "created": "2026-01-02T03:04:05Z",
        "status": "ok",
        "strategy": {
            "name": name,
            "label": label,
            "config": {},
            "status": "published",
            "reconstructed": (),
            "paper": "a paper",
            "distribution": "upcycle-bench",
            "version": "0.1.0",
        },
        "protocol": {
            "name": "smoke",
            "division": "closed",
            "overrides": (),
            "training_fingerprint": "train-fingerprint",
            "suite_fingerprints": {"zero-shot": "suite-fingerprint"},
            "resolved": {"threads": 1},
        },
        "seeds": {"init": init, "train": train},
        "receipt": {"function_drift": 0.0},
        "scores": scores,
        "headlines": headlines_of(changes.get("scores", scores)),
        "diagnostics": {"vision.1": {"router_entropy": 1.5}},
        "cost": {
            "phases": {
                "upcycle": {"seconds": 1.0, "flops": 1_000, "peak_memory_bytes": 1},
                "train": {"seconds": 10.0, "flops": 20_000, "peak_memory_bytes": 1},
                "evaluate": {"seconds": 5.0, "flops": 400_000, "peak_memory_bytes": 1},
            },
            "counting_rule": "2 per multiply-add",
            "parameters_total": 100,
            "parameters_active": 60,
            "tokens_dropped": 0.25,
            "samples": 640,
            "samples_per_second": 64.0,
            "world_size": 1,
        },
        "environment": {"python": "3.11"},
        "hashes": {"dense": "dense-hash", "data": "data-hash"},
        "command": ["upcycle-bench", "run"],
    }
    for key, value in changes.items():
        merged = isinstance(value, dict) and isinstance(tree.get(key), dict) and key != "headlines"
        tree[key] = tree[key] | value if merged else value
    return Record(**tree)


def tuned_part(*candidates: tuple[str, list[float]], lower: bool = False) -> dict[str, Any]:
    """How a tuned row was chosen among candidates, each a label and its scores; a run cost 1,000 FLOPs and 2 s."""
    return {
        "protocol": "smoke-dev",
        "headline": "in-distribution",
        "higher_is_better": not lower,
        "rule": "best mean over the tuning seeds",
        "seeds": tuple(1000 + place for place in range(len(candidates[0][1]))),
        "candidates": tuple(
            {
                "label": label,
                "config": {"options of": label},
                "runs": tuple(
                    {"run_id": f"{number}234567-{place}", "seed": 1000 + place, "value": value}
                    | {"flops": 1_000, "seconds": 2.0}
                    for place, value in enumerate(values)
                ),
            }
            for number, (label, values) in enumerate(candidates)
        ),
    }


def headlines_of(scores: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The means of the scores of each headline, in the order of the scores, as a record has them."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for each in scores:
        if each["headline"]:
            parts.setdefault(each["headline"], []).append(each)
    return {
        name: {
            "value": sum(part["value"] for part in each) / len(each),
            "higher_is_better": each[0]["higher_is_better"],
            "chance": None if None in (known := [part["chance"] for part in each]) else sum(known) / len(known),
            "standard_error": each[0].get("standard_error"),
        }
        for name, each in parts.items()
    }


def score(dataset: str, metric: str, value: float, *, headline: str = "", lower: bool = False) -> dict[str, Any]:
    return {
        "suite": "zero-shot",
        "dataset": dataset,
        "metric": metric,
        "value": value,
        "higher_is_better": not lower,
        "chance": None,
        "samples": 100,
        "headline": headline,
    }
