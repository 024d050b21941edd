"""Both towers at once: the same numbers to the bit as one after the other, alone and through whole trainings."""

import functools
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from tests.test_train import eesd, job, schedule, state, upcycled
from upcycle_bench import distributed, threads, towers
from upcycle_bench.data import PairDataset
from upcycle_bench.dense import create_clip
from upcycle_bench.errors import UserError
from upcycle_bench.flops import counted_flops
from upcycle_bench.moe import moe_layers
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.threads import SHARE, beside, core_is_free, shared, spare_thread
from upcycle_bench.train import parts_towers, train

Cores = Callable[[int], None]
pytestmark = pytest.mark.usefixtures("session")


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Cores:
    """Says how many cores there are."""

    def say(number: int) -> None:
        monkeypatch.setattr(threads, "cores", lambda: number)
        monkeypatch.setenv(SHARE, str(number))

    return say


def in_spare(seen: list[str]) -> Callable[..., None]:
    """A hook that notes in which thread it was called."""
    return lambda *_: seen.append(threading.current_thread().name)


# ---- when a core is free ---------------------------------------------------------------------------------------------


def test_a_core_is_free_where_threads_leave_one(cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(1)
    assert not core_is_free() and spare_thread() is None
    cores(2)
    assert core_is_free() and spare_thread() is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "_spare_thread", lambda number: f"one of {number}")
    for number, free, spare in ((2, False, False), (3, True, False), (4, True, True)):
        cores(number)
        assert (core_is_free(), threads._spare_thread_if_free() is not None) == (free, spare)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 2)
    assert not core_is_free() and spare_thread() is None
    monkeypatch.undo()
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setenv(SHARE, "1")
    assert not core_is_free()
    monkeypatch.setenv(SHARE, "many")
    with pytest.raises(UserError, match=f"{SHARE} must be a number of cores, not 'many'"):
        core_is_free()


def test_the_spare_thread_has_as_many_threads_and_rests_while_flops_are_counted(cores: Cores) -> None:
    cores(2)
    spare = spare_thread()
    assert spare is not None and spare.submit(torch.get_num_threads).result() == 1
    with counted_flops():
        assert spare_thread() is None


def test_what_is_begun_beside_gives_what_it_makes_or_raises(cores: Cores) -> None:
    for number in (1, 2):
        cores(number)
        seen: list[str] = []
        assert beside(lambda seen=seen: in_spare(seen)() or 7).result() == 7
        assert seen[0].startswith("spare") is (number == 2)
        with pytest.raises(ZeroDivisionError):
            beside(lambda: 1 // 0).result()


@pytest.mark.parametrize("broken", [None, "first", "last", "both"])
def test_shared_work_is_done_once_and_an_error_ends_it(cores: Cores, broken: str | None) -> None:
    cores(2)
    done: list[int] = []
    meeting = threading.Barrier(2, timeout=20)

    def work(number: int) -> None:
        if number in (0, 5):
            meeting.wait()  # one thread begins at one end, the other at the other
        if broken and number in {"first": [0], "last": [5], "both": [0, 5]}[broken]:
            raise ValueError(number)
        done.append(number)

    works = [functools.partial(work, number) for number in range(6)]
    if broken is None:
        shared(works)
        assert sorted(done) == [0, 1, 2, 3, 4, 5]
        return
    with pytest.raises(ValueError, match={"first": "0", "last": "5", "both": "0"}[broken]):
        shared(works)
    before = list(done)
    spare = spare_thread()
    assert spare is not None and spare.submit(int).result(5) == 0 and done == before  # nothing comes late


def test_who_shares_does_not_wait_for_a_thread_that_is_busy(cores: Cores) -> None:
    cores(2)
    spare, go_on, seen = spare_thread(), threading.Event(), []
    assert spare is not None
    busy = spare.submit(go_on.wait, 20)
    shared([lambda: in_spare(seen)()] * 3)
    shared([lambda: in_spare(seen)()] * 3, worth=False)
    go_on.set()
    assert busy.result() and seen == [threading.current_thread().name] * 6


# ---- forwards --------------------------------------------------------------------------------------------------------


def test_both_are_called_at_once(cores: Cores) -> None:
    cores(2)
    meeting = threading.Barrier(2, timeout=20)  # where each waits for the other
    assert towers.both(lambda: meeting.wait() * 0, lambda: meeting.wait() * 0 + 1, at_once=True) == (0, 1, False)
    seen: list[str] = []
    towers.both(in_spare(seen), in_spare(seen), at_once=False)
    cores(1)
    towers.both(in_spare(seen), in_spare(seen), at_once=True)
    assert seen == [threading.current_thread().name] * 4


def test_random_numbers_come_in_the_order_of_one_thread(cores: Cores) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4), torch.rand(4)
    cores(2)
    for at_once in (False, True):
        torch.manual_seed(3)
        first, second, drew = towers.both(lambda: torch.rand(4), lambda: torch.rand(4), at_once=at_once)
        assert drew and torch.equal(first, expected[0]) and torch.equal(second, expected[1])


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_either_arrives(cores: Cores, broken: int) -> None:
    cores(2)
    calls = [lambda: 1, lambda: 1]
    calls[broken] = lambda: 1 // 0
    with pytest.raises(ZeroDivisionError):
        towers.both(*calls, at_once=True)


# ---- backwards -------------------------------------------------------------------------------------------------------


class TwoTowers(nn.Module):
    """The names of open_clip's CLIP, one matrix each; `unused` takes part in nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(3, 3)
        self.transformer = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def loss(self) -> Tensor:
        x_BD = torch.arange(12.0).view(4, 3) / 12
        image_BD, text_BD = self.visual(x_BD), self.transformer(x_BD).tanh()
        loss: Tensor = (self.logit_scale * image_BD @ text_BD.T).logsumexp(1).mean() + text_BD.square().mean()
        return loss


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def equal(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    return one.keys() == other.keys() and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def test_gradients_are_those_of_one_pass_scaled_and_added_up(cores: Cores) -> None:
    torch.manual_seed(0)
    model = TwoTowers()
    for _ in range(2):
        (model.loss() * 0.25).backward()
    expected = gradients(model)
    assert expected["unused.weight"] is None and expected["visual.weight"] is not None
    cores(2)
    model.zero_grad()
    for _ in range(2):
        loss = model.loss()
        made = towers.apart(loss, model)
        assert made is not loss and torch.equal(made, loss)
        (made * 0.25).backward()
    assert equal(gradients(model), expected)


def test_the_text_tower_goes_back_in_the_spare_thread(cores: Cores) -> None:
    cores(2)
    model, seen = TwoTowers(), {"transformer": [], "visual": []}
    for name, names in seen.items():
        model.get_submodule(name).weight.register_hook(in_spare(names))
    towers.apart(model.loss(), model).backward()
    assert seen["visual"] == [threading.current_thread().name]
    assert len(seen["transformer"]) == 1 and seen["transformer"][0].startswith("spare")


@pytest.mark.parametrize("frozen", ["visual", "transformer"])
def test_a_frozen_tower_leaves_one_pass(cores: Cores, frozen: str) -> None:
    cores(2)
    model = TwoTowers()
    model.get_submodule(frozen).requires_grad_(False)
    if frozen == "visual":
        model.logit_scale.requires_grad_(False)
    else:
        model.unused.requires_grad_(False)
    loss = model.loss()
    assert towers.apart(loss, model) is loss


def test_an_error_in_a_pass_arrives(cores: Cores) -> None:
    cores(2)
    model = TwoTowers()

    def fail(grad: Tensor) -> None:
        raise ZeroDivisionError

    model.transformer.weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        towers.apart(model.loss(), model).backward()


# ---- trainings -------------------------------------------------------------------------------------------------------


STEPS = 12  # of which every third has its FLOPs counted, and is computed in one thread


def trained(
    pairs: PairDataset, make_loss: Any = lambda layers: None, precision: str = "fp32", patch_dropout: float = 0
) -> tuple[dict[str, Tensor], Any]:
    clip = upcycled()
    if patch_dropout:
        clip.model.visual.patch_dropout = PatchDropout(patch_dropout)
    progress = train(
        clip, pairs, job(schedule=schedule(steps=STEPS, precision=precision), stop_step=STEPS), make_loss=make_loss
    )
    return state(clip), progress


@pytest.mark.parametrize("make_loss", [lambda layers: None, eesd], ids=["plain", "eesd"])
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"patch_dropout": 0.5}], ids=["fp32", "bf16", "drop"])
def test_a_training_is_the_same_to_the_bit(
    pairs: PairDataset, cores: Cores, monkeypatch: pytest.MonkeyPatch, make_loss: Any, changes: dict[str, Any]
) -> None:
    cores(1)
    expected, alone = trained(pairs, make_loss, **changes)
    cores(2)
    calls: list[str] = []
    usual = towers._Passes.run
    monkeypatch.setattr(towers._Passes, "run", lambda *args: (in_spare(calls)(), usual(*args))[1])
    found, progress = trained(pairs, make_loss, **changes)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert progress.last | {"samples_per_second": 0} == alone.last | {"samples_per_second": 0}
    assert progress.counted_flops == alone.counted_flops > 0
    assert {name.startswith("spare") for name in calls} == {False, True}


def test_what_the_towers_must_not_share() -> None:
    """Weights used more than once in a forward pass: what autocast keeps of them would be a matter of threads."""
    clip = upcycled()
    assert towers.separable(clip.model) and towers.separable(create_clip("smoke-vit").model)
    layer = next(iter(moe_layers(clip.model).values()))
    layer.experts[1].c_fc.weight = layer.experts[0].c_fc.weight
    assert not towers.separable(clip.model)
    other = upcycled()
    next(iter(moe_layers(other.model).values())).experts[0] = nn.Identity()
    assert not towers.separable(other.model)


def test_when_towers_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine_of(stage: int = 0, accumulated: int = 1) -> Any:
        return SimpleNamespace(
            zero_optimization_stage=lambda: stage,
            gradient_accumulation_steps=lambda: accumulated,
            module=create_clip("smoke-vit").model,
        )

    def extra(apart: bool) -> Any:
        return SimpleNamespace(towers_apart=apart)

    assert parts_towers(engine_of(), None) and parts_towers(engine_of(), extra(True))
    assert not parts_towers(engine_of(), extra(False))
    assert not parts_towers(engine_of(stage=1), None)
    assert not parts_towers(engine_of(accumulated=2), None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert not parts_towers(engine_of(), None)


def test_a_forward_pass_without_a_loss_leaves_no_answer_behind(cores: Cores) -> None:
    cores(2)
    clip = upcycled()
    layers = moe_layers(clip.model.train())
    loss = eesd(layers)
    images = torch.rand(4, 3, 8, 8)
    for scale in (1, 2):
        clip.model.encode_image(images * scale)
    cores(1)
    clip.model.encode_image(images * 3)
    found = loss.compute()
    clip.model.encode_image(images * 3)
    assert torch.equal(found, loss.compute())
    cores(2)
    clip.model.encode_image(images)
    loss.close()
    assert not loss.ahead and not loss.seen


def test_an_interrupt_while_the_spare_thread_starts_comes_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    steps = []

    def interrupted() -> None:
        with threads._uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            steps.append("went on")

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps == ["went on"]


def test_no_graph_outlives_its_step(pairs: PairDataset, cores: Cores) -> None:
    cores(2)
    clip = upcycled()
    train(clip, pairs, job(schedule=schedule(steps=STEPS), stop_step=STEPS))
    assert moe_layers(clip.model)
    for layer in moe_layers(clip.model).values():
        assert layer.l_aux is not None and layer.l_aux.grad_fn is None
        assert layer.moe.deepspeed_moe.l_aux.grad_fn is None


def test_a_loss_with_parameters_of_its_own_gets_their_gradients(pairs: PairDataset, cores: Cores) -> None:
    class Learned(ExtraLoss):
        name = "learned"

        def __init__(self) -> None:
            self.scale, self.steps = nn.Parameter(torch.ones(())), 0

        def compute(self) -> Tensor:
            return self.scale.square()

        def after_step(self) -> None:
            self.steps += self.scale.grad is not None

    cores(2)
    loss = Learned()
    trained(pairs, lambda layers: loss)
    assert loss.steps == STEPS
