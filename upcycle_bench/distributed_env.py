"""What torchrun tells each process, without importing torch."""

import os


def rank() -> int:
    """This process's number; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """True on the rank that writes and prints."""
    return rank() == 0
