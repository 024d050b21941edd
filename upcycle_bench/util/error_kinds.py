"""What an error says of who has failed: nobody, perhaps another rank, or this one.

    orderly(KeyboardInterrupt())        # True: an interruption is no failure
    in_collective(error)                # True: another rank may have failed, and broken a collective here

It rests on the type of an error, its status and the files that it came through, on no text of gloo or NCCL.
"""

from __future__ import annotations

import traceback

import torch.distributed as dist

ORDERLY = (75, 130)  # exit statuses of interruptions, which are no failures
COLLECTIVES = ("torch/distributed", "deepspeed/comm")  # an error in this code may be another rank's


def orderly(error: BaseException) -> bool:
    """Whether it is no failure: an interruption, or the end of a training that goes on later."""
    return not isinstance(error, Exception) or getattr(error, "status", None) in ORDERLY


def in_collective(error: BaseException) -> bool:
    """Whether it came from a collective, or from the store: then it may be another rank's failure that shows here."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, dist.DistError) or any(part in frame.filename for frame in frames for part in COLLECTIVES)
