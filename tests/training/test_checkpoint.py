"""Checkpoints: the last two stay, a damaged one is passed over, a full disk ends nothing but the checkpoint."""

import errno
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_loop import job, state
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.training import checkpoint, checkpoint_files
from upcycle_bench.training.checkpoint import NotKept
from upcycle_bench.training.job import Session
from upcycle_bench.training.loop import train
from upcycle_bench.training.stopping import Stopped, stoppable
from upcycle_bench.util.errors import UserError

pytestmark = pytest.mark.usefixtures("session")


def clip(seed: int = 0) -> Clip:
    return create_clip("smoke-vit", seed=seed)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def at_step(wanted: int, then: Any) -> Any:
    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        if step == wanted:
            then()

    return on_step


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(pairs: PairDataset) -> dict[str, torch.Tensor]:
    """The weights of an uninterrupted training."""
    made = clip()
    train(made, pairs, job())
    return state(made)


@pytest.fixture
def interrupted(pairs: PairDataset, tmp_path: Path) -> Path:
    """Checkpoints of steps 4 and 5 of a training that was interrupted in step 6."""
    with pytest.raises(KeyboardInterrupt):
        train(clip(), pairs, job(checkpoints=tmp_path, checkpoint_every=1), on_step=at_step(6, interrupt))
    assert saved(tmp_path) == ["step4", "step5"]
    return tmp_path


def goes_on(pairs: PairDataset, folder: Path) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The steps that the same training makes now, and its weights."""
    steps: list[int] = []
    made = clip(seed=5)
    train(made, pairs, job(checkpoints=folder, checkpoint_every=1), on_step=lambda step, _: steps.append(step))
    return steps, state(made)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [("__0_0.distcp", flip), (".metadata", flip), ("__0_0.distcp", Path.unlink), ("manifest.json", cut)],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    pairs: PairDataset,
    interrupted: Path,
    whole: dict[str, torch.Tensor],
    capfd: pytest.CaptureFixture[str],
    name: str,
    damage: Any,
) -> None:
    damage(interrupted / "step5" / name)
    (interrupted / ".step6.tmp").mkdir()  # what a killed process left
    steps, weights = goes_on(pairs, interrupted)
    lines = [line for line in capfd.readouterr().err.splitlines() if "checkpoint" in line]
    assert len(lines) == 2
    assert lines[0].startswith(f"the checkpoint {interrupted / 'step5'} is damaged (")
    assert lines[1] == "the training goes on from the checkpoint before, of step 4"
    assert steps == [5, 6]
    assert all(torch.equal(value, weights[key]) for key, value in whole.items())
    assert saved(interrupted) == ["step5", "step6"]


def test_where_no_checkpoint_is_whole_nothing_starts_over_in_silence(pairs: PairDataset, interrupted: Path) -> None:
    for step in ("step4", "step5"):
        flip(interrupted / step / "__0_0.distcp")
    with pytest.raises(UserError, match="no checkpoint is whole; --fresh starts anew"):
        goes_on(pairs, interrupted)
    assert saved(interrupted) == ["step4", "step5"]


def test_a_checkpoint_of_an_earlier_version_is_one_line(pairs: PairDataset, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step200")
    with pytest.raises(UserError, match="is of an earlier version, which this one cannot read; --fresh"):
        goes_on(pairs, tmp_path)


class Full:
    """Stands in for the writing of checkpoints: the disk is full for those of some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.real = steps, checkpoint._Writing._write

    def __call__(self, writing: Any, part: Path) -> Any:
        if writing.progress.step in self.steps:
            part.mkdir()
            (part / "half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(writing, part)


def test_a_full_disk_costs_a_checkpoint_and_the_second_in_a_row_the_training(
    pairs: PairDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    full = Full(2, 4, 5)
    monkeypatch.setattr(checkpoint._Writing, "_write", lambda *arguments: full(*arguments))
    with pytest.raises(UserError, match=r"step 5 was not written: .*no space is left.* second in a row") as raised:
        goes_on(pairs, tmp_path)
    assert "\n" not in str(raised.value)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "the checkpoint of step 2 was not written" in warnings[0]
    assert "The one before stays, and the training goes on." in warnings[0]
    assert saved(tmp_path) == ["step1", "step3"]
    full.steps = (5, 6)  # of a training that is done, the second is only said
    assert goes_on(pairs, tmp_path)[0] == [4, 5, 6]
    assert saved(tmp_path) == ["step3", "step4"]


def test_a_file_that_grows_too_large_is_no_checkpoint(
    pairs: PairDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the writer itself meets on a disk that is nearly full."""
    from torch.distributed.checkpoint import filesystem

    def write(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(filesystem, "_write_item", write)
    with pytest.raises(UserError, match="second in a row"):
        goes_on(pairs, tmp_path)
    assert saved(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_training_after_the_step_with_a_checkpoint(
    pairs: PairDataset, tmp_path: Path, whole: dict[str, torch.Tensor], number: signal.Signals
) -> None:
    """Also where the protocol writes none by itself. The same training then goes on, to the same weights."""
    settings = job(checkpoints=tmp_path, metrics=tmp_path / "metrics.jsonl")
    with pytest.raises(Stopped) as stopped, stoppable():
        train(clip(), pairs, settings, on_step=at_step(3, lambda: os.kill(os.getpid(), number)))
    assert (stopped.value.code, stopped.value.by, stopped.value.step) == (75, number.name, 3)
    assert saved(tmp_path) == ["metrics.jsonl", "step3"]
    made = clip(seed=5)
    progress = train(made, pairs, settings)
    assert all(torch.equal(value, state(made)[key]) for key, value in whole.items())
    assert [(each.first_step, each.last_step) for each in progress.sessions] == [(0, 3), (3, 6)]


@pytest.mark.parametrize(
    ("full", "before"),
    [((2, 3), "the checkpoint before, of step 1."), ((1, 3), "the checkpoint before, of step 2."), ((1, 2, 3), "")],
)
def test_a_stop_whose_checkpoint_is_not_written_is_a_failure(
    pairs: PairDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    full: tuple[int, ...],
    before: str,
) -> None:
    writes, every = Full(*full), int(1 not in full or 2 not in full)
    monkeypatch.setattr(checkpoint._Writing, "_write", lambda *arguments: writes(*arguments))
    kept = job(checkpoints=tmp_path, checkpoint_every=every)
    with pytest.raises(NotKept) as ended, stoppable():
        train(clip(), pairs, kept, on_step=at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert ended.value.status == 1
    assert str(ended.value).startswith("stopped by SIGTERM, but the checkpoint of step 3 was not written: ")
    assert str(ended.value).endswith(before or "goes on from step 0, since there is none before it.")
    said = capfd.readouterr().err
    assert "of step 3" not in said and said.count("the training goes on") == (full == (1, 3))


def test_without_a_folder_for_checkpoints_a_signal_ends_at_once(pairs: PairDataset) -> None:
    with pytest.raises(Stopped), stoppable():
        train(clip(), pairs, job(), on_step=at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))


def test_another_machine_is_said(
    pairs: PairDataset, interrupted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("upcycle_bench.util.environment.device_name", lambda device: "another CPU")
    goes_on(pairs, interrupted)
    assert "since then device another CPU (before: " in capfd.readouterr().err


def test_a_checkpoint_names_its_sessions(interrupted: Path) -> None:
    manifest = checkpoint_files._manifest(interrupted / "step5")
    (session,) = manifest.progress.sessions
    assert isinstance(session, Session)
    assert (session.world_size, session.ep_size, session.first_step, session.last_step) == (1, 1, 0, 5)
    assert session.versions["torch"] == torch.__version__.partition("+")[0]


def test_metrics_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with checkpoint.MetricsFile(path, 0) as log:
        real = log.file

        class Half:
            """A file of which a full disk takes half a line."""

            def write(self, data: bytes) -> int:
                return real.write(data[: len(data) // 2])

            truncate = staticmethod(real.truncate)

        log.write({"step": 1})
        log.file = Half()
        log.write({"step": 2})
        assert path.read_text() == '{"step": 1}\n'
        log.file = real
        log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
