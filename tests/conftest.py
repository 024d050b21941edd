"""What all tests share: a cache of their own for the whole session, and quick versions of `smoke`."""

import os

# One thread each: the tests' tensors are tiny, and several processes with two threads would wait for each other. Where
# a test asks for two, the one that waits sleeps: on busy cores it would else keep the other from its work.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from upcycle_bench.util.cache import cache_root

REAL_CACHE = cache_root()  # the user's own, before the tests get theirs

# Set before anything asks for the cache, and inherited by the processes that tests start.
QUICK = [
    "dense.schedule.steps=12",
    "dense.schedule.batch_size=32",
    "train.schedule.steps=4",
    "train.schedule.batch_size=32",
]


# Files of minutes come first, so that no process is left alone with one at the end (make test: --no-loadscope-reorder).
LONG = (
    "training/test_distributed.py",
    "test_run_many.py",
    "test_run_processes.py",
    "test_run_queue.py",
    "test_interrupted.py",
    "cli/test_training_data.py",
    "model/test_plain_moe.py",
    "test_run.py",
    "test_end_to_end.py",
    "training/test_other_ranks.py",
    "util/test_first_cause.py",
    "reporting/test_html_browser.py",
    "data/test_lab_real.py",
    "cli/test_main.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; the others in their order."""
    place = {f"tests/{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONG)))


def pytest_collection() -> None:
    """It imports everything: many objects and no garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """PyTorch's own too: whoever imported torch first, numbers are those of one thread unless a test asks for more."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the session: worlds and dense models are built once."""
    before = os.environ.get("UPCYCLE_BENCH_CACHE")
    path = tmp_path_factory.mktemp("cache")
    os.environ["UPCYCLE_BENCH_CACHE"] = str(path)
    yield path
    if before is None:
        del os.environ["UPCYCLE_BENCH_CACHE"]
    else:
        os.environ["UPCYCLE_BENCH_CACHE"] = before


@pytest.fixture
def quick() -> list[str]:
    """Overrides that make a `smoke` run a matter of seconds."""
    return list(QUICK)


@pytest.fixture
def quick_flags() -> list[str]:
    """The same as command-line options."""
    return [part for override in QUICK for part in ("--set", override)]


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """A training session of one thread, for all tests of a file."""
    from upcycle_bench.training import session as engine

    with engine.open_session(threads=1):
        yield


@pytest.fixture(scope="module")
def pairs() -> Any:
    """The digits' training pairs, as `smoke` reads them: a PairDataset."""
    from upcycle_bench.data.pairs import PairDataset
    from upcycle_bench.data.worlds import load_world
    from upcycle_bench.model.clip import create_clip

    return PairDataset(load_world("digits", 0).train_shards, create_clip("smoke-vit"))
