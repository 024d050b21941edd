"""upcycle-bench: a fair benchmark of ways to turn a dense CLIP into a mixture of experts.

The Python API, described in docs/api.md:

    model = upcycle_bench.upcycle(dense, "cluster-aware", calibration=loader)  # dense: an open_clip CLIP; it is copied
    upcycle_bench.save(model, "moe.safetensors", "ViT-B-32")
    clip = upcycle_bench.load("moe.safetensors")                               # clip.model, .tokenize, .transform
    upcycle_bench.moe_layers(model)                                            # the layers with experts, by name

Nothing heavy is imported here, so that `upcycle-bench --help` stays instant: what the API needs (torch, open_clip,
DeepSpeed) comes with the first use of it. A plugin author needs `upcycle_bench.strategy`, `upcycle_bench.suite` and
`upcycle_bench.hookspecs`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle_bench.api import load, save, upcycle
    from upcycle_bench.model.moe import moe_layers

__all__ = ["__version__", "load", "moe_layers", "save", "upcycle"]
__version__ = version("upcycle-bench")


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "model.moe" if name == "moe_layers" else "api"
        return getattr(import_module(f"upcycle_bench.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
