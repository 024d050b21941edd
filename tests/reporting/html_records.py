"""Records for tests of the HTML page: verdicts of all kinds, names that are hard to show, failures, two boards."""

from pathlib import Path

from tests.records import make_record, score
from tests.reporting.test_leaderboard import failure, runs
from upcycle_bench.record import Record
from upcycle_bench.reporting.html.behind import Runs
from upcycle_bench.util import strict_json

SCRIPT = "<script>alert(1)</script>"
CLOSING = "</script><img src=x onerror=alert(2)><!--"
LONG = "long-" + "x" * 195
SIGNS = "a|b$c_d&amp;\"'{{ 7 * 7 }}"
LAYERS = {
    "layers": {"vision.1": {"function_drift": 0.1, "expert_cosine": 0.9, "router_entropy": 1.5, "load": [0.7, 0.3]}}
}


def hard_records() -> list[Record]:
    """Two boards. The first has rows that are better, worse and neither, and a row for each hard name."""
    made = [*runs("sparse-upcycling", {0: 1.0, 1: 1.02, 2: 0.98}, receipt=LAYERS, diagnostics=LAYERS)]
    made += runs("up", {0: 2.0, 1: 2.03, 2: 1.99}, strategy={"status": "reconstructed"}, receipt=LAYERS)
    made += runs("down", {0: 0.5, 1: 0.51, 2: 0.49})
    made += runs("level", {0: 1.1, 1: 0.9, 2: 1.02})
    made += [make_record(name, value=0.7) for name in (SCRIPT, CLOSING, LONG, SIGNS)]
    made += [failure("broken", reason=f"RuntimeError: {CLOSING} " + "y" * 300), failure("up", train=9)]
    for number, dataset in enumerate(("near", "far", SCRIPT)):
        scores = [score(dataset, "log_rank", 3.0 + number, headline="shift", lower=True)]
        made.append(make_record("sparse-upcycling", protocol={"name": "zoo"}, init=number, scores=scores))
    return made


def many_records(rows: int) -> list[Record]:
    """A record for each row, as long as ours are."""
    return [make_record(f"strategy-{n}[ratio={n}]", value=n / rows, receipt=LAYERS) for n in range(rows)]


def placed(records: list[Record], folder: Path, steps: int = 0) -> Runs:
    """The records with paths below `folder`; with training metrics of so many steps beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [(record, folder / f"{number:04}.json") for number, record in enumerate(records)]
    lines = "".join(strict_json.dumps({"step": s, "contrastive": 2.0 / (s + 1)}) + "\n" for s in range(steps))
    for _, path in found if steps else ():
        path.with_suffix(".jsonl").write_text(lines)
    return found
