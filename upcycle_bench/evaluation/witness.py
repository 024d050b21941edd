"""The witness watches an evaluation and keeps what its certificate is made of (certificate.py).

    with Witness(model) as witness:                           # the model as it is scored, in evaluation mode
        context = EvalContext(..., on_encoded=witness.on_encoded)
        results = {name: suite.evaluate(context) for name, suite in suites.items()}
    witness.samples["images"].chosen()                        # inputs to encode again, and their embeddings

It keeps a random sample of the encoded images and texts, counts what every router did, and hashes the weights before
the first suite runs. Shape suffixes: N inputs of one kind.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.routes import Routes
from upcycle_bench.util.flops import uncounted
from upcycle_bench.util.rng import Stream

LEAST, MOST, SHARE = 128, 512, 10  # of each kind one input in SHARE is encoded again, within these bounds


@dataclass
class Reservoir:
    """A random sample of one kind of input (Vitter's algorithm R): rows, their embeddings, and what encodes them.

    `encode` is the last encoder that `add` was given; `seen` counts all inputs so far.
    """

    generator: torch.Generator
    encode: Any = None
    seen: int = 0
    rows: list[Tensor] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)

    def add(self, encode: Any, inputs: Tensor, embedded_BC: Tensor) -> None:
        """Show a batch to the sample, which keeps MOST rows at the most."""
        self.encode = encode
        draws = torch.rand(len(inputs), generator=self.generator, dtype=torch.float64).tolist()
        for place, draw in enumerate(draws):
            self.seen += 1
            slot = len(self.rows) if len(self.rows) < MOST else int(draw * self.seen)
            if slot < MOST:
                self.rows[slot : slot + 1] = [inputs[place].clone()]
                self.embeddings[slot : slot + 1] = [embedded_BC[place].clone()]

    def chosen(self) -> tuple[list[Tensor], Tensor]:
        """The inputs to encode again, each once, and their embeddings [N, C]; needs at least one row."""
        number = min(MOST, max(LEAST, self.seen // SHARE))
        order = torch.randperm(len(self.rows), generator=self.generator).tolist()[:number]
        once = {_key(self.rows[place]): place for place in order}
        return [self.rows[place] for place in once.values()], torch.stack([self.embeddings[p] for p in once.values()])


@dataclass
class Routed:
    """How many choices the gate of one layer made, and how many of them it dropped.

    The hook belongs to this small object alone: whoever copies the model copies its hooks and what they belong to.
    """

    made: list[tuple[int, Tensor]] = field(default_factory=list)

    def count(self, _gate: nn.Module, _args: Any, routes: Routes) -> None:
        """Forward hook of the gate."""
        index_KT = routes.index_KT  # -1: dropped
        self.made.append((index_KT.numel(), (index_KT < 0).sum()))  # summed at the end, so that a GPU need not wait

    @property
    def choices(self) -> int:
        """All (token, choice) pairs."""
        return sum(choices for choices, _ in self.made)

    @property
    def dropped(self) -> int:
        """The pairs without an expert."""
        return sum(int(dropped) for _, dropped in self.made)


class Witness:
    """Watches an evaluation of `model`. It ignores batches of other models, such as copies that a suite trains.

    `samples`: "images" and "texts"; `routed`: MoE layer -> its choices; `before`: tensor -> sha256 at the start.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.samples = {kind: Reservoir(Stream(("certificate", kind)).generator()) for kind in ("images", "texts")}
        self.routed: dict[str, Routed] = {}
        self.before: dict[str, str] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Witness:
        self.before = digests(self.model)
        for name, layer in moe_layers(self.model).items():
            self.routed[name] = Routed()
            self._handles.append(layer.gate.register_forward_hook(self.routed[name].count))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @uncounted()
    def on_encoded(self, model: nn.Module, encode: Any, inputs: Tensor, embedded_BC: Tensor) -> None:
        """Sample a batch of images (floating) or texts (integers) with their normalised embeddings on the CPU."""
        if model is self.model:
            self.samples["images" if inputs.is_floating_point() else "texts"].add(encode, inputs, embedded_BC)


def digests(model: nn.Module) -> dict[str, str]:
    """sha256 of every tensor of the model's state: its type, shape and bytes."""
    found = {}
    for name, value in model.state_dict().items():
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}\0".encode() + data.tobytes()).hexdigest()
    return found


def _key(row: Tensor) -> bytes:
    """Tells equal inputs. They have equal embeddings, so rounding would decide which of them is the nearest."""
    return hashlib.sha256(f"{tuple(row.shape)}".encode() + row.contiguous().cpu().numpy().tobytes()).digest()
