"""The tuning rule: what can be tuned where, how many candidates there are, and which seeds may be reported."""

from pathlib import Path

import pytest

from upcycle_bench.planning.registry import Entry, load_registry
from upcycle_bench.planning.tuning import candidates, refuse_tuning_seeds, shared_overrides, tuning_of
from upcycle_bench.protocol import Protocol, load_protocol
from upcycle_bench.util.errors import UserError

REGISTRY = load_registry()
SMOKE = REGISTRY.protocols["smoke"].target


def protocol(name: str, overrides: list[str] | None = None) -> Protocol:
    return load_protocol(REGISTRY.protocols[name].target, overrides)


def test_which_protocols_can_be_tuned_and_that_what_decides_is_not_reported() -> None:
    """`tuning_of` refuses another training, and sets that the protocol itself reports."""
    tuned = {name: protocol(name) for name in REGISTRY.protocols if protocol(name).tuning}
    assert tuned.keys() == {"lab", "smoke"}
    assert {name: tuning_of(REGISTRY, made)[1].name for name, made in tuned.items()} == {
        "lab": "lab-dev",
        "smoke": "smoke-dev",
    }


@pytest.mark.parametrize("name", ["lab-dev", "lab-fp32", "smoke-dev", "clip-b32"])
def test_a_rule_is_not_inherited(name: str) -> None:
    with pytest.raises(UserError, match=rf"^protocol {name} has no \[tuning\] table"):
        tuning_of(REGISTRY, protocol(name))


def own(tmp_path: Path, rule: str) -> Protocol:
    """`smoke` with this line of its own in the rule."""
    key = rule.partition(" ")[0]
    lines = [rule if line.startswith(f"{key} =") else line for line in SMOKE.read_text().splitlines()]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    return load_protocol(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ('protocol = "lab-dev"', "is tuned on lab-dev, which trains otherwise (model, threads, dense, data, train"),
        ('protocol = "smoke"', "reports digits-retrieval, digits-test, by which smoke would choose"),
        ('protocol = "smoke-dv"', "did you mean 'smoke-dev'"),
        ('headline = "in-distributio"', "did you mean 'in-distribution'"),
    ],
)
def test_a_rule_that_cannot_be(tmp_path: Path, rule: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        tuning_of(REGISTRY, own(tmp_path, rule))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tuning.candidates=1", "tuning.candidates: "),
        ("tuning.seeds=[1,1]", "different numbers"),
        ("tuning.seeds=[-1]", "from 0 on"),
        ('tuning.rule="best of all seeds"', "tuning.rule: "),
    ],
)
def test_a_table_that_is_no_rule(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        protocol("smoke", [override])


def test_candidates_share_the_overrides_of_the_training() -> None:
    made = protocol("smoke", ["tuning.candidates=9", "train.lr_factor=2.0"])
    assert shared_overrides(made.overrides) == ["train.lr_factor=2.0"]
    table, dev = tuning_of(REGISTRY, made)
    assert (table.candidates, dev.overrides, dev.train.lr_factor) == (9, ("train.lr_factor=2.0",), 2.0)


def test_the_defaults_are_the_first_candidate() -> None:
    plans = candidates(REGISTRY, "drop-upcycling", *tuning_of(REGISTRY, protocol("smoke")), [{"ratio": "0.75"}])
    assert [(plan.label, plan.division) for plan in plans] == [
        ("drop-upcycling", "closed"),
        ("drop-upcycling[ratio=0.75]", "open"),
    ]
    assert {plan.protocol.name for plan in plans} == {"smoke-dev"}


@pytest.mark.parametrize(
    ("tries", "message"),
    [
        ([{"ratio": "0.5"}], "--try ratio=0.5: that is drop-upcycling, which is a candidate already"),
        ([{"ratio": "0.7"}, {"ratio": "0.70"}], "--try ratio=0.70: that is drop-upcycling[ratio=0.7]"),
        ([{"ratio": str(number)} for number in range(4)], "are 5 configurations; every strategy has at most 4"),
        ([{"rato": "0.7"}], "did you mean 'ratio'"),
        ([{"ratio": "7"}], "drop-upcycling: ratio: "),
    ],
)
def test_candidates_that_cannot_be(tries: list[dict[str, str]], message: str) -> None:
    with pytest.raises(UserError) as raised:
        candidates(REGISTRY, "drop-upcycling", *tuning_of(REGISTRY, protocol("smoke")), tries)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_seed_of_the_tuning_is_not_reported() -> None:
    table = protocol("smoke").tuning
    assert table is not None
    refuse_tuning_seeds(table, [(0, 0), (999, 1002)])
    for pair in ((0, 1001), (1000, 0)):
        with pytest.raises(UserError, match="is one of the tuning"):
            refuse_tuning_seeds(table, [(0, 0), pair])


def test_a_plugins_protocol_can_name_its_own_sets(tmp_path: Path) -> None:
    (tmp_path / "theirs-dev.toml").write_text(REGISTRY.protocols["smoke-dev"].target.read_text())
    (tmp_path / "smoke.toml").write_text(SMOKE.read_text())
    theirs = load_registry()
    theirs.protocols["theirs-dev"] = Entry("theirs-dev", tmp_path / "theirs-dev.toml", "theirs", "1")
    assert tuning_of(theirs, own(tmp_path, 'protocol = "theirs-dev"'))[1].name == "theirs-dev"
