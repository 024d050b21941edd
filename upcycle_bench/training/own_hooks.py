"""The forward hooks that a strategy's own loss puts on the model: they see training steps, and nothing else.

hooks = OwnHooks(model)             # before the loss is made
extra = make_loss(layers)
with hooks.off(): ...               # forward passes that are none of its business
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


class OwnHooks:
    """The hooks that the model gets from now on."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {module: [set(hooks) for hooks in _hooks_of(module)] for module in model.modules()}

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Take them off the model during the block."""
        taken = []
        for module, known in self._before.items():
            for hooks, earlier in zip(_hooks_of(module), known, strict=True):
                if new := hooks.keys() - earlier:
                    taken.append((hooks, dict(hooks)))
                    for key in new:
                        del hooks[key]
        try:
            yield
        finally:
            for hooks, whole in taken:
                hooks.clear()
                hooks.update(whole)  # in their order


def _hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_pre_hooks, module._forward_hooks]
