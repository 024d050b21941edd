"""Plans: fingerprints change with what they must and with nothing else; missing options are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle_bench.model.config import model_config
from upcycle_bench.planning.fingerprint import dense_recipe, training_fingerprint
from upcycle_bench.planning.plan import Paths, Plan, find_world, make_plan, run_id
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.util.errors import UserError

REGISTRY = load_registry()


def plan(strategy: str = "sparse-upcycling", *overrides: str, protocol: str = "smoke", **options: object) -> Plan:
    return make_plan(REGISTRY, strategy, load_protocol(REGISTRY.protocols[protocol].target, list(overrides)), **options)  # type: ignore[arg-type]


def test_strategy_and_seeds_are_not_part_of_the_fingerprints() -> None:
    one, two = plan(), plan("cluster-aware", options={"tau": "0.8"}, init_seed=3, train_seed=4)
    assert one.training_fingerprint == two.training_fingerprint
    assert one.suite_fingerprints == two.suite_fingerprints
    assert (two.label, two.init_seed, two.train_seed) == ("cluster-aware[tau=0.8]", 3, 4)


@pytest.mark.parametrize(
    ("override", "training", "suite"),
    [
        ("moe.capacity_factor=1.5", True, False),
        ("train.schedule.steps=7", True, False),
        ("dense.seed=1", True, False),
        ("dense.lr=1e-3", True, False),
        ("threads=2", True, False),
        ("data.seed=1", True, True),
        ('suites.zero-shot.headlines.in-distribution=["digits-test"]', False, True),
        ("train.log_every=3", False, False),
        ("train.checkpoint_every=3", False, False),
        ("data.bad_samples=0.5", False, False),
        ("data.window=1048576", False, False),  # as usual
        ("data.window=100", True, False),
        ("data.order=replacement", True, False),
    ],
)
def test_what_changes_which_fingerprint(override: str, training: bool, suite: bool) -> None:
    before, after = plan(), plan("sparse-upcycling", override)
    assert (before.training_fingerprint != after.training_fingerprint) is training
    assert (before.suite_fingerprints != after.suite_fingerprints) is suite
    assert after.protocol.division == "open"


def test_numerics_and_model_configuration_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan().training_fingerprint
    monkeypatch.setattr("upcycle_bench.planning.fingerprint.NUMERICS", -1)
    assert plan().training_fingerprint != before
    monkeypatch.undo()
    monkeypatch.setattr("upcycle_bench.planning.fingerprint._model", lambda protocol: {"config": {"embed_dim": 1}})
    assert plan().training_fingerprint != before


def test_a_model_counts_by_its_configuration_wherever_that_stands(tmp_path: Path) -> None:
    config = model_config("smoke-vit")
    config["vision_cfg"]["layers"] = 3
    world, found = plan().world, []
    assert world is not None
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.json").write_text(json.dumps(config))
        protocol = load_protocol(REGISTRY.protocols["smoke"].target, [f"model={tmp_path / folder / 'mine.json'}"])
        found.append(training_fingerprint(protocol, world, "given", None))
    assert found[0] == found[1] != training_fingerprint(plan().protocol, world, "given", None)


def test_local_data_is_asked_for_and_found(tmp_path: Path) -> None:
    open_plan = plan(protocol="clip-b32")
    assert [text.split()[0] for text in open_plan.missing] == ["--data", "--eval-data", "--checkpoint"]
    assert open_plan.training_fingerprint is None
    with pytest.raises(UserError, match=r"none.pt: no such file; give one with weights of ViT-B-32"):
        plan(protocol="clip-b32", paths=Paths(checkpoint=str(tmp_path / "none.pt")))


def test_local_shards_without_evaluation_sets_are_a_world_to_train_on(tmp_path: Path) -> None:
    digits = plan().world
    assert digits is not None
    protocol = load_protocol(REGISTRY.protocols["clip-b32"].target)
    world = find_world(protocol, Paths(data=str(digits.train_shards[0].parent)))
    assert (world.name, world.train_shards) == ("local", tuple(map(str, digits.train_shards)))
    assert (
        world.sha256 == find_world(protocol, Paths(data=str(digits.train_shards[0].parent), eval_data=tmp_path)).sha256
    )


def test_a_missing_evaluation_set_is_named(tmp_path: Path) -> None:
    world = plan().world
    assert world is not None
    paths = Paths(data=str(world.train_shards[0].parent), eval_data=world.eval_root)
    with pytest.raises(UserError, match="wds_imagenet1k"):
        plan(protocol="clip-b32", paths=paths)


def test_paths_go_with_local_protocols_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="brings its own data"):
        plan(paths=Paths(data="x"))
    with pytest.raises(UserError, match="brings its own dense model"):
        plan(paths=Paths(checkpoint=str(tmp_path)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('suites.zero-shot.headlines.in-distribution=["elsewhere"]', "headlines name what is not in sets: elsewhere"),
        ("suites.zero-shot.headlines.in-distribution=[]", "headlines: in-distribution names no set"),
        ('suites.zero-shot.headlines.in-distribution=["digits-test", "digits-test"]', "headlines names a set twice"),
        ('suites.zero-shot.sets=["digits-nothing"]', "digits-"),
        ("suites.zero-shot.sets=3", "sets"),
    ],
)
def test_bad_suite_settings_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan("sparse-upcycling", override)
    assert "\n" not in str(caught.value)


def test_a_protocol_gives_a_strategy_its_options_for_the_scale() -> None:
    protocol = load_protocol(REGISTRY.get("protocol", "clip-b16").target)
    usual = make_plan(REGISTRY, "cluster-aware", protocol)
    assert usual.strategy.config()["eesd_weight"] == 0.1
    assert usual.strategy.config()["eesd_ema"] == 0.999  # as printed, whatever the share of the steps
    assert usual.label == "cluster-aware"
    other = make_plan(REGISTRY, "cluster-aware", protocol, options={"eesd_weight": "1.0", "tau": "0.8"})
    assert other.strategy.config()["eesd_weight"] == 1.0
    assert other.label == "cluster-aware[tau=0.8,eesd_weight=1.0]"


def test_a_wrong_option_in_a_protocol_is_one_line() -> None:
    protocol = load_protocol(REGISTRY.get("protocol", "clip-b16").target)
    wrong = protocol.model_copy(update={"strategies": {"cluster-aware": {"tou": 1}}})
    with pytest.raises(UserError, match="tou"):
        make_plan(REGISTRY, "cluster-aware", wrong)


def test_the_longer_control_is_a_run_of_its_own_in_the_same_table() -> None:
    usual, longer, untrained = plan("dense"), plan("dense-longer"), plan("dense-frozen")
    assert (usual.steps, longer.steps, untrained.steps) == (100, 132, 0)
    assert longer.training_fingerprint == usual.training_fingerprint
    assert (longer.division, longer.unequal) == ("closed", None)
    assert run_id(longer, "dense") != run_id(usual, "dense")


# ---- a shape of the strategy's own --------------------------------------------------------------------------------


def test_a_shape_of_the_same_cost_stays_closed() -> None:
    usual, fine, wide = plan(), plan("virtual-group"), plan("dense-wide")
    for other in (fine, wide):
        assert (other.division, other.unequal) == ("closed", None)
        assert other.training_fingerprint == usual.training_fingerprint
    assert usual.moe == usual.protocol.moe == fine.protocol.moe
    assert (fine.moe.experts, fine.moe.top_k) == (16, 4)
    assert fine.moe.model_copy(update={"experts": 8, "top_k": 2}) == usual.moe


def test_a_shape_of_another_cost_is_open_and_says_why() -> None:
    usual, dear = plan(), plan("virtual-group", options={"granularity": "16"})
    assert (usual.division, dear.division) == ("closed", "open")
    assert dear.protocol.division == "closed"
    assert dear.unequal == "13,214,720 forward FLOPs per pair, the protocol's own MoE has 12,508,160"
    assert dear.training_fingerprint != usual.training_fingerprint  # it has a table of its own
    assert dear.suite_fingerprints == usual.suite_fingerprints
    assert plan("virtual-group", "moe.experts=4").division == "open"  # for the override, not for its cost
    assert plan("virtual-group", "moe.experts=4").unequal is None


def test_an_impossible_width_is_one_line_before_anything_runs() -> None:
    with pytest.raises(UserError, match="granularity 5 does not divide") as caught:
        plan("virtual-group", options={"granularity": "5"})
    assert "\n" not in str(caught.value)


def test_the_number_of_ranks_is_part_of_every_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a training from a given dense model, of a run, and of a dense model that is trained first."""
    torch.save({}, checkpoint := tmp_path / "dense.pt")
    world = plan().world
    assert world is not None
    paths = Paths(data=str(world.train_shards[0].parent), checkpoint=str(checkpoint), eval_data=world.eval_root)
    sets = (
        'suites.zero-shot.sets=["digits-test", "digits-validation"]',
        'suites.zero-shot.headlines.imagenet=["digits-test"]',
        'suites.zero-shot.headlines.shift=["digits-validation"]',
    )
    given = plan("sparse-upcycling", *sets, protocol="clip-b32", paths=paths)

    def identities() -> list[str | None]:
        again = plan("sparse-upcycling", *sets, protocol="clip-b32", paths=paths)
        return [again.training_fingerprint, run_id(given, "dense"), dense_recipe(plan().protocol, world)]

    one = identities()
    assert identities() == one
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    two = identities()
    assert None not in one
    assert not set(one) & set(two)


def test_torchs_version_is_part_of_a_dense_models_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol, world = plan().protocol, plan().world
    assert world is not None
    before = dense_recipe(protocol, world)
    assert dense_recipe(protocol, world) == before
    monkeypatch.setattr(torch, "__version__", "another")
    assert dense_recipe(protocol, world) != before


@pytest.mark.parametrize(
    ("name", "value"), [("NUMERICS", -1), ("_model", lambda protocol: {"config": {"embed_dim": 1}})]
)
def test_numerics_and_model_configuration_count_for_a_given_dense_model_too(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    """A dense model that is trained on the spot has both in its own identity; a given one has its sha256 alone."""
    protocol, world = plan().protocol, plan().world
    assert world is not None

    def identities() -> set[str]:
        return {training_fingerprint(protocol, world, "given", None), dense_recipe(protocol, world)}

    before = identities()
    monkeypatch.setattr(f"upcycle_bench.planning.fingerprint.{name}", value)
    assert not identities() & before
