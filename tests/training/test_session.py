"""A session has what DeepSpeed's engine needs, and leaves the process as it was."""

import contextlib

import pytest
import torch
import torch.distributed as dist

from upcycle_bench.training.session import open_session


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_threads_and_process_group_are_those_of_the_session_and_afterwards_as_before(
    error: type[Exception] | None,
) -> None:
    before = torch.get_num_threads()
    with contextlib.suppress(ZeroDivisionError), open_session(threads=before + 1):
        assert torch.get_num_threads() == before + 1 and dist.is_initialized()
        if error is not None:
            raise error
    assert torch.get_num_threads() == before and not dist.is_initialized()
