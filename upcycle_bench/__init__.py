"""upcycle-bench: a fair benchmark of ways to turn a dense CLIP into a mixture of experts.

The Python API, described in docs/api.md:

    model = upcycle_bench.upcycle(dense, "cluster-aware", calibration=loader)  # dense: an open_clip CLIP; it is copied
    upcycle_bench.save(model, "moe.safetensors", "ViT-B-32")
    clip = upcycle_bench.load("moe.safetensors")                               # clip.model, .tokenize, .transform
    upcycle_bench.moe_layers(model)                                            # the layers with experts, by name
    upcycle_bench.UserError                                                    # what bad input raises, in one line

Nothing heavy is imported here, so that `upcycle-bench --help` stays instant. What the API needs (torch, open_clip,
DeepSpeed) is imported at its first use. A plugin author needs `upcycle_bench.strategy`, `upcycle_bench.suite` and
`upcycle_bench.hookspecs`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle_bench.api import load, save, upcycle
    from upcycle_bench.model.clip import Clip
    from upcycle_bench.model.moe import moe_layers
    from upcycle_bench.util.errors import UserError

__all__ = ["Clip", "UserError", "__version__", "load", "moe_layers", "save", "upcycle"]
__version__ = version("upcycle-bench")

_MODULES = {"Clip": "model.clip", "UserError": "util.errors", "moe_layers": "model.moe"}  # the others stand in api


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"upcycle_bench.{_MODULES.get(name, 'api')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
