"""upcycle-bench: a fair benchmark of ways to turn a dense CLIP into a mixture of experts.

Nothing heavy is imported here, so that `upcycle-bench --help` stays instant. A plugin author needs
`upcycle_bench.strategy`, `upcycle_bench.suite` and `upcycle_bench.hookspecs`.
"""

from importlib.metadata import version

__version__ = version("upcycle-bench")
