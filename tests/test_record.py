"""Records: validation, round trips, atomic writing, and one-line errors for bad files."""

import json
import os
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from tests.records import headlines_of, make_record, score
from upcycle_bench import record as module
from upcycle_bench.record import json_schema, read, read_outcomes, record_paths, write
from upcycle_bench.strategy import Status
from upcycle_bench.util.errors import UserError


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# ---- validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "changes",
    [
        lambda bad: {"scores": [score("a", "acc1", 0.5, headline="in"), score("a", "acc5", bad)]},
        lambda bad: {"receipt": {"drift": bad}},
        lambda bad: {"diagnostics": {"vision.1": {"load": [0.5, bad]}}},
        lambda bad: {"protocol": {"resolved": {"lr": bad}}},
        lambda bad: {"cost": {"samples_per_second": bad}},
    ],
)
def test_no_nan_or_infinity_anywhere(changes: Any, bad: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        make_record(**changes(bad))


def test_a_headline_is_the_mean_of_the_scores_that_name_it() -> None:
    scores = [score("a", "x", 0.2, headline="in"), score("b", "x", 0.6, headline="in"), score("c", "x", 9.0)]
    scores.append(score("d", "x", 0.3, headline="shift", lower=True))
    right = headlines_of(scores)
    made = make_record(scores=scores).headlines
    assert list(made) == ["in", "shift"]
    assert (made["in"].value, made["in"].higher_is_better) == (0.4, True)  # (0.2 + 0.6) / 2
    assert (made["shift"].value, made["shift"].higher_is_better) == (0.3, False)
    with pytest.raises(ValidationError, match=r"headline in is 0\.5, but the mean of its parts is 0\.4"):
        make_record(scores=scores, headlines=right | {"in": right["in"] | {"value": 0.5}})
    for missing in ({}, {"in": right["in"]}, {"shift": right["shift"]}):
        with pytest.raises(ValidationError, match=r"scores name the headlines \['in', 'shift'\], the record has "):
            make_record(scores=scores, headlines=missing)
    with pytest.raises(ValidationError, match=r"scores name the headlines \[\], the record has \['in'\]"):
        make_record(scores=[score("c", "x", 0.4)], headlines={"in": right["in"]})
    with pytest.raises(ValidationError, match=r"scores name the headlines \['in', 'shift'\], the record has .*'mixed'"):
        make_record(scores=scores, headlines=right | {"mixed": right["in"]})


def test_a_headline_has_the_direction_of_all_its_parts() -> None:
    up, down = score("a", "x", 0.5, headline="in"), score("b", "x", 0.5, headline="in", lower=True)
    assert make_record(scores=[up]).headlines["in"].higher_is_better
    assert not make_record(scores=[down]).headlines["in"].higher_is_better
    for scores in ([up, down], [down, up]):
        with pytest.raises(ValidationError, match="headline in: a part has another direction"):
            make_record(scores=scores)
    wrong = headlines_of([up])["in"] | {"higher_is_better": False}
    with pytest.raises(ValidationError, match="headline in: a part has another direction"):
        make_record(scores=[up], headlines={"in": wrong})
    described = up | {"higher_is_better": None}  # it describes the model and does not judge it
    for direction in (True, False):
        with pytest.raises(ValidationError, match="headline in: a part has another direction"):
            make_record(scores=[described], headlines={"in": wrong | {"higher_is_better": direction}})
    with pytest.raises(ValidationError, match="valid boolean"):
        make_record(scores=[described])


def test_scores_are_unique() -> None:
    with pytest.raises(ValidationError, match="same suite, dataset and metric"):
        make_record(scores=[score("a", "x", 0.5, headline="in"), score("a", "x", 0.1)])


@pytest.mark.parametrize("status", ["failed"])
def test_a_run_that_is_not_ok_needs_a_reason_and_nothing_more(status: str) -> None:
    short: dict[str, Any] = {"status": status, "receipt": None, "scores": [], "cost": None}
    assert make_record(**short, reason="out of memory").reason == "out of memory"
    for reason in (None, "", "  "):
        with pytest.raises(ValidationError, match="needs a reason"):
            make_record(**short, reason=reason)


@pytest.mark.parametrize("missing", [{"cost": None}, {"scores": []}])
def test_a_run_that_is_ok_is_complete(missing: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs a headline score and its cost"):
        make_record(**missing)


def test_overrides_open_the_division() -> None:
    with pytest.raises(ValidationError, match="open division"):
        make_record(protocol={"overrides": ("moe.experts=4",)})
    assert make_record(protocol={"overrides": ("moe.experts=4",), "division": "open"})


def test_a_shape_of_another_cost_opens_the_division() -> None:
    with pytest.raises(ValidationError, match="of another cost, belongs in the open division"):
        make_record(protocol={"unequal": "twice the FLOPs"})
    assert make_record(protocol={"unequal": "twice the FLOPs", "division": "open"}).protocol.unequal
    assert make_record().protocol.unequal is make_record().strategy.moe is None  # as in older records


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"schema_version": 1},
        {"schema_version": 3},
        {"created": "2026-01-02T03:04:05+02:00"},  # not UTC
        {"created": "2026-13-02T03:04:05Z"},  # no such month
        {"run_id": "../../escape"},
        {"seeds": {"train": "0"}},  # strict: no coercion
        {"cost": {"phases": {"trian": {"seconds": 1.0, "flops": 1, "peak_memory_bytes": 1}}}},
        {"cost": {"tokens_dropped": 1.5}},
    ],
)
def test_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_record(**changes)


def test_strategy_status_is_the_contracts() -> None:
    assert get_args(module.StrategyPart.model_fields["status"].annotation) == get_args(Status)


# ---- writing and reading ---------------------------------------------------------------------------------------


def test_write_then_read(tmp_path: Path) -> None:
    record = make_record("cluster-aware[tau=0.8]", init=1, train=2, run_id="abcdef0123456789")
    outcomes = {"digits-test/log_likelihood": np.array([-0.5, -1.5], np.float32), "file": np.array([1, 2])}
    path = write(record, outcomes, tmp_path)
    assert path == tmp_path / "smoke" / "cluster-aware-tau=0.8-i1-t2-20260102T030405-abcdef01.json"
    assert files(tmp_path) == [path.name, path.with_suffix(".npz").name] and record_paths(tmp_path) == [path]
    back = read(path)
    assert back.hashes.outcomes is not None and len(back.hashes.outcomes) == 64
    assert back.model_copy(update={"hashes": record.hashes}) == record  # only the hash was added
    stored = read_outcomes(path)
    assert sorted(stored) == sorted(outcomes)
    for name, array in outcomes.items():
        assert stored[name].dtype == array.dtype
        np.testing.assert_array_equal(stored[name], array)
    with np.load(path.with_suffix(".npz")) as plain:  # an ordinary .npz
        assert sorted(plain) == sorted(outcomes)


def test_a_record_without_outcomes(tmp_path: Path) -> None:
    path = write(make_record(), None, tmp_path)
    assert files(tmp_path) == [path.name]
    assert read(path).hashes.outcomes is None and read_outcomes(path) == {}


def test_outcome_bytes_depend_on_content_only(tmp_path: Path) -> None:
    a, b = np.arange(1000), np.linspace(0, 1, 7, dtype=np.float32)
    one = write(make_record(), {"a": a, "b": b}, tmp_path / "1")
    two = write(make_record(), {"b": b, "a": a}, tmp_path / "2")
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".npz").read_bytes() == two.with_suffix(".npz").read_bytes()


def test_outcomes_of_another_run_are_refused(tmp_path: Path) -> None:
    path = write(make_record(), {"a": np.arange(3)}, tmp_path)
    path.with_suffix(".npz").write_bytes(b"other")
    with pytest.raises(UserError, match="sha256 differs"):
        read_outcomes(path)
    path.with_suffix(".npz").unlink()
    with pytest.raises(UserError, match="No such file"):
        read_outcomes(path)


def test_never_overwrites(tmp_path: Path) -> None:
    path = write(make_record(value=0.5), {"a": np.arange(3)}, tmp_path)
    before = path.read_bytes(), path.with_suffix(".npz").read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        write(make_record(value=0.6), {"a": np.arange(4)}, tmp_path)
    assert (path.read_bytes(), path.with_suffix(".npz").read_bytes()) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
def test_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, stop: Any
) -> None:
    """The first call writes the outcomes or moves them to their place, the second one the record."""
    real, calls = getattr(os, function), []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == call:
            raise stop
        real(*arguments)

    monkeypatch.setattr(os, function, interrupted)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else UserError):
        write(make_record(), {"a": np.arange(3)}, tmp_path)
    assert files(tmp_path) == []
    monkeypatch.undo()
    assert read(write(make_record(), {"a": np.arange(3)}, tmp_path))  # and the next attempt succeeds


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write record .*choose another folder") as error:
        write(make_record(), {"a": np.arange(3)}, tmp_path / "file")
    assert "\n" not in str(error.value)


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    path = write(make_record("../../a b/é" + "x" * 300, protocol={"name": ".."}), None, tmp_path)
    assert path.parent == tmp_path / "unnamed"
    assert path.name.startswith("a-b-xxx") and len(path.name) < 200


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda text: text.replace('"train": 0', '"train": -1'),
            r"seeds\.train: .*greater than or equal to 0 \(got -1\)",
        ),
        (lambda text: text.replace('"drift": 0.0', '"drift": NaN'), "not strict JSON"),
        (lambda text: text.replace('"drift": 0.0', '"drift": 1e999'), "not strict JSON"),
        (
            lambda text: text.replace('"schema_version": 2', '"schema_version": 3'),
            "schema version 3.* reads 2; use the",
        ),
        (
            lambda text: text.replace('"schema_version": 2', '"schema_version": 1'),
            "schema version 1.* reads 2; use the version that wrote it",
        ),
        (lambda text: text[: len(text) // 2], "not strict JSON"),
        (lambda text: text.replace('"seeds"', '"seedz"'), r"seeds: Field required"),
        (
            lambda text: text.replace('"in-distribution": {\n      "value": 0.5', '"in-distribution": {"value": 0.7'),
            r"headline in-distribution is 0\.7, but the mean of its parts is 0\.5",
        ),
        (
            lambda text: text.replace('"headline": "in-distribution"', '"headline": "shift"'),
            r"scores name the headlines \['shift'\], the record has \['in-distribution'\]",
        ),
        (lambda text: '{"boards": []}', "not an upcycle-bench record"),
        (lambda text: "[" * 100_000, "not strict JSON"),
        (lambda text: "\udcff", "not strict JSON"),
    ],
)
def test_a_bad_file_is_one_line_naming_it(tmp_path: Path, edit: Any, message: str) -> None:
    path = write(make_record(receipt={"drift": 0.0}), None, tmp_path)
    path.write_bytes(edit(path.read_text()).encode("utf-8", "surrogateescape"))
    for reader in (read, lambda path: record_paths(tmp_path)):
        with pytest.raises(UserError, match=message) as error:
            reader(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_record_paths(tmp_path: Path) -> None:
    assert record_paths(tmp_path) == []
    late, early = (write(make_record(train=train), None, tmp_path) for train in (1, 0))
    (tmp_path / "notes.txt").write_text("not a record")
    assert record_paths(tmp_path) == [early, late] and record_paths(late) == [late]
    with pytest.raises(UserError, match="no such file or folder"):
        record_paths(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"notes\.txt is not strict JSON"):
        record_paths(tmp_path / "notes.txt")


def test_the_schema_describes_what_is_written(tmp_path: Path) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "$id" not in schema and schema["title"] == "upcycle-bench record" and schema["description"]
    failed = make_record(train=1, status="failed", reason="why", receipt=None, scores=[], cost=None)
    for record in (make_record(), failed):
        tree = json.loads(write(record, {"a": np.arange(2)}, tmp_path).read_text())
        jsonschema.validate(tree, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tree | {"surprise": 1}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tree | {"schema_version": 1}, schema)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(
    value=FINITE,
    receipt=st.none() | st.dictionaries(st.text(), JSON, max_size=3),
    diagnostics=st.dictionaries(st.text(), JSON, max_size=3),
    command=st.lists(st.text(), max_size=3),
    config=st.dictionaries(st.text(), JSON, max_size=3),
    flops=st.none() | st.integers(min_value=0, max_value=10**30),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, value: float, flops: int | None, config: Any, **changes: Any
) -> None:
    phases = {"train": {"seconds": 1.0, "flops": flops, "peak_memory_bytes": 0}}
    record = make_record(value=value, strategy={"config": config}, cost={"phases": phases}, **changes)
    path = write(record, None, tmp_path_factory.mktemp("records"))
    assert read(path) == record
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
