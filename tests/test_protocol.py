"""Protocols: parsing, overrides, derived values, and that the published ones say where every value comes from."""

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from upcycle_bench.data.worlds import lab as world
from upcycle_bench.planning.fingerprint import NUMERICS
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import Data, Protocol, flatten, learning_rate, load_protocol
from upcycle_bench.util.errors import UserError

PATHS = {name: entry.target for name, entry in load_registry().protocols.items()}


def values(protocol: Protocol) -> dict[str, object]:
    """What a run under the protocol depends on: not what it says of itself, measures or lets tune."""
    return flatten(protocol.model_dump(mode="json", exclude={"name", "summary", "tuning", "validation"}))


@pytest.mark.parametrize("name", PATHS)
def test_the_shipped_protocols(name: str) -> None:
    protocol = load_protocol(PATHS[name])
    assert (protocol.name, protocol.division) == (name, "closed")


def test_which_protocols_ship() -> None:
    assert {"smoke", "clip-b32", "clip-b16", "lab", "lab-dev", "lab-long", "lab-fp32", "lab-seed1"} <= set(PATHS)


FROZEN = {
    "lab": "3d9eaa43a1b644f5",
    "lab-dev": "5049daa3c77f7db7",
    "lab-fp32": "56ddc7e1cac1576a",
    "lab-long": "f589637ad6a812a7",
    "lab-seed1": "ab1511f1941379d3",
}


@pytest.mark.parametrize("name", FROZEN)
def test_the_lab_is_frozen(name: str) -> None:
    """Whoever changes a value of it makes a third edition, and all its records count as another table."""
    text = json.dumps(values(load_protocol(PATHS[name])), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == FROZEN[name]


def test_what_else_the_labs_records_depend_on_is_frozen() -> None:
    suite = load_registry().get("suite", "zero-shot").target
    assert (world.VERSION, suite.info.version, NUMERICS) == (4, 3, 3)


def test_lab_and_lab_dev_train_alike() -> None:
    """They differ only in what is scored, so weights trained for one can be scored for the other."""
    lab, dev = load_protocol(PATHS["lab"]), load_protocol(PATHS["lab-dev"])
    different = {key for key in values(lab) if values(lab)[key] != values(dev)[key]}
    optional = {key for key in different if key.startswith("optional_suites.")}
    assert different - optional == {"suites.zero-shot.sets", "suites.zero-shot.headlines.shift"}
    assert not any("test" in name for name in dev.suites["zero-shot"]["sets"])
    assert not any("dev" in name for name in lab.suites["zero-shot"]["sets"])
    for protocol, other in ((lab, "dev-"), (dev, "test-")):
        assert other not in repr(protocol.optional_suites)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lab-long", {"dense.schedule.steps": 8000, "train.schedule.steps": 2000}),
        ("lab-fp32", {"train.schedule.precision": "fp32"}),
        ("lab-seed1", {"dense.seed": 1}),
    ],
)
def test_variants_of_lab_change_what_they_say(name: str, changes: dict[str, object]) -> None:
    """A variant that changes the dense model trains its own: only that of lab ships."""
    if any(key.startswith("dense") for key in changes):
        changes = {**changes, "dense.source": "pretrain", "dense.shipped": ""}
    assert values(load_protocol(PATHS[name])) == values(load_protocol(PATHS["lab"])) | changes


@pytest.mark.parametrize(
    ("name", "dense_batch", "batch", "steps", "capacity_factor"),
    # 1.3B samples / 16,384 = 79,345.7; / 32,768 = 39,672.9
    [("clip-b32", 16384, 16384, 79346, 2.0), ("clip-b16", 65536, 32768, 39673, 1.5)],
)
def test_published_values(name: str, dense_batch: int, batch: int, steps: int, capacity_factor: float) -> None:
    protocol = load_protocol(PATHS[name])
    assert protocol.dense.schedule.batch_size == dense_batch
    assert (protocol.train.schedule.batch_size, protocol.train.schedule.steps) == (batch, steps)
    # 5.3B samples
    assert protocol.dense.schedule.steps == 5_300_000_000 // dense_batch
    assert protocol.moe.model_dump() == {
        "experts": 8,
        "top_k": 2,
        "every": 2,
        "offset": 1,
        "capacity_factor": capacity_factor,
        "min_capacity": 4,
        "load_balance": 0.001,
        "second_expert_sampling": False,
        "ep_size": 1,
    }
    schedule = protocol.train.schedule
    assert schedule.warmup_fraction == protocol.dense.schedule.warmup_fraction == 0.02
    assert (schedule.betas, schedule.eps, schedule.weight_decay) == ((0.9, 0.98), 1e-6, 0.2)
    # 5e-4 * (1 - 0.75) / (1 - 0.02) = 1.2755e-4
    assert protocol.peak_lr == pytest.approx(1.2755e-4, rel=1e-4)


@pytest.mark.parametrize("name", ["clip-b32", "clip-b16"])
def test_every_published_value_names_its_source(name: str) -> None:
    protocol = load_protocol(PATHS[name])
    settings = flatten(protocol.model_dump(mode="json", exclude={"sources", "overrides", "name", "summary"}))
    assert set(protocol.sources) == set(settings) - {"dense.shipped"}  # their checkpoint is given
    assert all(source.startswith(("paper", "ours", "DeepSpeed", "ln 100")) for source in protocol.sources.values())


def test_overrides_open_the_division_and_reach_their_place() -> None:
    protocol = load_protocol(PATHS["smoke"], ["moe.experts=4", 'suites.zero-shot.sets=["digits-test"]'])
    assert protocol.division == "open"
    assert protocol.moe.experts == 4
    assert protocol.suites["zero-shot"]["sets"] == ["digits-test"]
    assert protocol.overrides == ("moe.experts=4", 'suites.zero-shot.sets=["digits-test"]')


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe.expert=4", "did you mean 'moe.experts'"),
        ("moe.expert=4", "'moe.ep_size'? There are "),  # beside near matches, only the number of the others
        ("xyzzy=4", "train.schedule.steps"),  # without a near match, all keys
        ("moe.experts=four", "moe.experts: Input should be a valid integer (got 'four')"),
        ("moe.experts=4.0", "moe.experts: Input should be a valid integer"),
        ("moe.experts=1", "moe.experts: Input should be greater than or equal to 2"),
        ("moe.ep_size=3", "must be divisible by ep_size"),
        ("moe.top_k=9", "top_k (9) exceeds experts (8)"),
        ("train.schedule.precision=fp8", "'fp32' or 'bf16'"),
        ("train.schedule.eps=nan", "not a finite number"),
        ("moe=3", "unknown protocol key 'moe'"),
        ("moe.experts", "write it as KEY=VALUE"),
        ("name=other", "unknown protocol key 'name'"),
    ],
)
def test_bad_overrides_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_protocol(PATHS["smoke"], [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_the_data_that_are_usual_are_not_written() -> None:
    """Records and fingerprints of earlier versions do not have them."""
    usual = {"window": 1 << 20, "order": "permutation", "weights": (), "bad_samples": 0.01}
    assert Data(world="lab", seed=0, **usual).model_dump(mode="json") == {"world": "lab", "seed": 0}
    chosen = ["data.order=replacement", "data.weights=[1.0, 3.0]", "data.window=5000", "data.bad_samples=0.02"]
    data = load_protocol(PATHS["clip-b32"], chosen).data
    assert (data.order, data.weights, data.window, data.bad_samples) == ("replacement", (1.0, 3.0), 5000, 0.02)
    assert data.model_dump(mode="json").keys() == {"world", "seed", "captions", *usual}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.weights=[1.0, 2.0]", 'data: weights needs order = "replacement"'),
        ("data.window=0", "data.window: Input should be greater than or equal to 1"),
        ("data.bad_samples=2.0", "data.bad_samples: Input should be less than or equal to 1"),
        ("data.order=random", "'permutation' or 'replacement'"),
    ],
)
def test_bad_settings_of_the_data_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_protocol(PATHS["clip-b32"], [override])
    assert message in str(caught.value)
    with pytest.raises(UserError, match="weights must be above 0; leave a source out"):
        load_protocol(PATHS["clip-b32"], ["data.order=replacement", "data.weights=[0.0, 2.0]"])


def test_a_source_may_be_named_of_a_setting_that_is_usual(tmp_path: Path) -> None:
    own = beside_smoke(tmp_path, own='extends = "smoke"\n[data]\nwindow = 1048576\n[sources]\n"data.window" = "ours"\n')
    assert load_protocol(own).sources["data.window"] == "ours"


def beside_smoke(folder: Path, **files: str) -> Path:
    """Write smoke.toml, with sources for two values, and other protocol files; returns the last one's path."""
    smoke = PATHS["smoke"].read_text()
    (folder / "smoke.toml").write_text(smoke + '[sources]\n"moe.experts" = "theirs"\n"moe.top_k" = "theirs"\n')
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{list(files)[-1]}.toml"


def test_extends_lays_a_file_over_another(tmp_path: Path) -> None:
    """Nested values are merged, lists replaced. A value that is changed loses its source, unless it gets a new one."""
    path = beside_smoke(
        tmp_path,
        child='extends = "smoke"\nsummary = "child"\n[moe]\nexperts = 4\n[train.schedule]\nsteps = 7\n',
        grandchild='extends = "child"\n[suites.zero-shot]\nsets = ["digits-test"]\n[moe]\ntop_k = 1\n'
        '[sources]\n"moe.top_k" = "ours"\n"train.schedule.steps" = "ours"\n',
    )
    protocol, smoke = load_protocol(path), load_protocol(tmp_path / "smoke.toml")
    assert smoke.sources == {"moe.experts": "theirs", "moe.top_k": "theirs"}
    assert (protocol.name, protocol.summary, protocol.division) == ("grandchild", "child", "closed")
    assert protocol.sources == {"moe.top_k": "ours", "train.schedule.steps": "ours"}
    settings = {key: value for key, value in values(smoke).items() if not key.startswith("sources.")}
    changes = {"moe.experts": 4, "moe.top_k": 1, "train.schedule.steps": 7, "suites.zero-shot.sets": ["digits-test"]}
    sources = {f"sources.{key}": value for key, value in protocol.sources.items()}
    assert values(protocol) == settings | changes | sources


def test_overrides_work_on_top_of_extends(tmp_path: Path) -> None:
    path = beside_smoke(tmp_path, child='extends = "smoke"\n[moe]\nexperts = 4\n')
    protocol = load_protocol(path, ["moe.experts=2", "threads=2"])
    assert (protocol.name, protocol.moe.experts, protocol.threads, protocol.division) == ("child", 2, 2, "open")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"child": 'extends = "nobody"'}, "child.toml: extends = 'nobody', but there is no"),
        ({"child": "extends = 3"}, "child.toml: extends = 3, but there is no"),
        ({"child": 'extends = "child"'}, "child.toml: it extends itself, by way of child.toml"),
        ({"one": 'extends = "two"', "two": 'extends = "one"'}, "two.toml: it extends itself, by way of one.toml"),
        ({"child": 'extends = "smoke"\nmoe = 3'}, "child: moe: Input should be"),
        ({"broken": "=", "child": 'extends = "broken"'}, "broken.toml: "),
    ],
)
def test_bad_extends_are_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_protocol(beside_smoke(tmp_path, **files))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_protocols_are_frozen() -> None:
    protocol = load_protocol(PATHS["smoke"])
    with pytest.raises(ValidationError):
        protocol.moe.experts = 4  # type: ignore[misc]


def test_learning_rate() -> None:
    # 10 steps, 20 % warm-up: steps 0, 1 climb to the peak (1/2, 2/2), then (10 - t) / 8 from t = 2 to 1/8 at t = 9.
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert learning_rate(0, 10, 1.0, 0.0) == 1.0
    # 2 % of clip-b32's 79,346 steps are 1586.92, rounded to 1587.
    assert learning_rate(1585, 79346, 1.0, 0.02) == pytest.approx(1586 / 1587, rel=1e-9)
