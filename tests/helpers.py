"""A tiny CLIP, data for it, and a strategy's work on it by the steps of `upcycling.initialise.make_experts`."""

from __future__ import annotations

import contextlib
import copy
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.data.batches import Batch
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.model.surgery import find_layers, put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import PUBLISHED_MOE, MoE, load_protocol
from upcycle_bench.strategy import Strategy, resolve_moe
from upcycle_bench.upcycling.calibration import calibrate
from upcycle_bench.upcycling.initialise import make_dense
from upcycle_bench.upcycling.preparation import TrainingWorkshop
from upcycle_bench.util.rng import Stream

START_OF_TEXT, END_OF_TEXT = 49406, 49407  # CLIP's tokenizer
MODEL = "smoke-vit"
SMOKE = load_registry().protocols["smoke"].target


def tiny_moe(**changes: Any) -> MoE:
    """The published layout on a small scale: top-2 of 4 experts in every other block."""
    return MoE(**(PUBLISHED_MOE.model_dump() | {"experts": 4} | changes))


@functools.cache
def _shared_clip() -> Clip:
    clip = create_clip(MODEL, seed=0)
    clip.model.eval()
    return clip


def tiny_clip(dtype: torch.dtype = torch.float32) -> Clip:
    """A fresh copy of the smoke protocol's model, with random weights. Random biases show if one is lost."""
    clip = _shared_clip()
    model = copy.deepcopy(clip.model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return replace(clip, model=model.to(dtype))


def captions(lengths: list[int], context: int, generator: torch.Generator, tail: Tensor | None = None) -> Tensor:
    """Random texts [B, L] of `lengths`, which count start and end of text; zeros or `tail` [B, L] follow the end."""
    text_BL = torch.zeros(len(lengths), context, dtype=torch.long) if tail is None else tail.clone()
    for row, length in zip(text_BL, lengths, strict=True):
        row[:length] = torch.randint(1, START_OF_TEXT, (length,), generator=generator)
        row[0], row[length - 1] = START_OF_TEXT, END_OF_TEXT
    return text_BL


class TinyPairs:
    """Stands in for a `PairDataset`: `calibration` gives random uint8 images and captions of all lengths."""

    def __init__(self, clip: Clip, limit: int = 128) -> None:
        self.clip, self.limit = clip, limit

    def __len__(self) -> int:
        return self.limit

    def pick(self, index: Tensor, rng: Stream) -> Batch:
        """Samples that repeat eight pairs, so that clusters are large."""
        (eight,) = self.calibration(Stream(("eight",)), 8, 8)
        return Batch(eight.images[index % 8], eight.texts[index % 8], index)

    def calibration(self, rng: Stream, pairs: int, batch_size: int) -> Iterator[Batch]:
        """At most `limit` pairs, the same ones for every size of batch."""
        generator = rng.child("pairs").generator()
        count, context = min(pairs, self.limit), self.clip.model.context_length
        tint = torch.randint(0, 256, (count, 3, 1, 1), generator=generator)  # tells images apart
        noise = torch.randint(-60, 61, (count, 3, *self.clip.model.visual.image_size), generator=generator)
        images = (tint + noise).clamp(0, 255).to(torch.uint8)
        lengths = torch.randint(3, context + 1, (count,), generator=generator).tolist()
        texts = captions(lengths, context, generator)
        for index in torch.arange(count).split(batch_size):
            yield Batch(images[index], texts[index], index)


class TinyWorkshop(TrainingWorkshop):
    """A workshop that does not train: it adds noise to the chosen parameters, drawn for the name and the rows."""

    def __init__(self, clip: Clip, moe: MoE, rng: Stream) -> None:
        protocol = load_protocol(SMOKE, [f"moe.experts={moe.experts}", "train.schedule.batch_size=4"])
        groups = [f"group {sample % 8}" for sample in range(64)]
        super().__init__(clip, TinyPairs(clip, len(groups)), protocol, rng, groups, label="tiny")  # type: ignore[arg-type]

    def steps_per_branch(self, branches: int, ceiling: int, **_: Any) -> int:
        return ceiling

    @torch.no_grad()
    def _fit(
        self, model: Any, rows_SB: Tensor, name: str, trainable: Callable[[str], bool], *_: Any
    ) -> tuple[int, float]:
        rng = self.rng.child("fit", name, *rows_SB.flatten().tolist())
        for key, parameter in model.named_parameters():
            if trainable(key):
                noise = torch.randn(parameter.shape, generator=rng.child(key).generator())
                parameter.add_(0.02 * noise)
        return 0, 0.0


def tiny_batches(clip: Clip, seed: int = 0, pairs: int = 128, batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Batches of (images [B, 3, H, W] in the model's dtype, texts [B, L]), the same for the same seed."""
    dtype = next(clip.model.parameters()).dtype
    batches = TinyPairs(clip, pairs).calibration(Stream(("tiny", seed)), pairs, batch_size)
    return [(clip.normalise(batch.images).to(dtype), batch.texts) for batch in batches]


@dataclass(frozen=True)
class Initialised:
    """What a strategy made of a CLIP, and what it was made from; dicts are by layer name.

    `model` is the CLIP whose FFNs were replaced, `branches` what a strategy that prepares has trained.
    """

    layers: list[Layer]
    ffns: dict[str, FFN]
    calibrators: dict[str, Any]
    streams: dict[str, Stream]
    inits: dict[str, LayerInit]
    model: Any
    branches: Sequence[Any] | None


def initialise(
    strategy: Strategy,
    clip: Clip,
    seed: int,
    *,
    moe: MoE | None = None,
    arrange: Callable[[list[Layer]], list[Layer]] = list,
) -> Initialised:
    """`make_experts` on tiny data. `arrange` changes the order in which layers are visited; the result's stays."""
    own = resolve_moe(strategy, moe or tiny_moe())
    layers = find_layers(clip.model, own)
    root = Stream(("strategy", strategy.info.name, seed))
    preparation = strategy.prepare(TinyWorkshop(clip, own, root.child("preparation")))
    model, branches = (preparation.model, preparation.branches) if preparation else (clip.model, None)
    ffns = {layer.name: FFN.of(model.get_submodule(layer.mlp_path)) for layer in layers}
    calibrators: dict[str, Any] = {}
    if branches is not None:
        for layer in layers:
            calibrators[layer.name] = [FFN.of(branch.get_submodule(layer.mlp_path)) for branch in branches]
    if strategy.calibration_pairs:
        for layer in arrange(layers):
            stream = root.child(layer.name, "calibration")
            calibrators[layer.name] = strategy.calibrator(ffns[layer.name], layer, stream)
        dtype = next(clip.model.parameters()).dtype
        batches = TinyPairs(clip).calibration(Stream(("calibration", seed)), strategy.calibration_pairs, 256)
        inputs = ((clip.normalise(batch.images).to(dtype), batch.texts) for batch in batches)
        calibrate(clip.model, arrange(layers), calibrators, inputs)
    streams = {layer.name: root.child(layer.name) for layer in layers}
    made = {
        layer.name: strategy.init_layer(ffns[layer.name], layer, calibrators.get(layer.name), root.child(layer.name))
        for layer in arrange(layers)
    }
    inits = {layer.name: made[layer.name] for layer in layers}
    return Initialised(layers, ffns, calibrators, streams, inits, model, branches)


def changes_model(strategy: Strategy) -> bool:
    """Whether a run trains anything but the dense model as it is."""
    return strategy.replaces_ffn or type(strategy).init_dense is not Strategy.init_dense


def upcycled(strategy: Strategy, clip: Clip, seed: int, moe: MoE | None = None) -> Clip:
    """The model a run would train at step 0; the dense one itself where the strategy changes nothing.

    `moe` is the protocol's.
    """
    if not changes_model(strategy):
        return clip
    own = resolve_moe(strategy, moe or tiny_moe())
    if not strategy.replaces_ffn:
        return replace(clip, model=make_dense(strategy, clip.model, own, seed))
    made = initialise(strategy, clip, seed, moe=moe)
    return replace(clip, model=put_experts(made.model, made.inits, own))


def features(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """Image and text features [2 B, C] in eval mode, without gradient."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model.encode_image(images), model.encode_text(texts)])


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """The same keys and the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def contrastive_loss(image_BC: Tensor, text_BC: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy of normalised features."""
    logits_BB = scale * image_BC @ text_BC.T
    target_B = torch.arange(len(logits_BB))
    return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2


def dense_forward(ffn: FFN, x_TD: Tensor) -> Tensor:
    """W2 act(W1 x + b1) + b2, [T, D]."""
    return F.linear(ffn.act(F.linear(x_TD, ffn.w1_HD, ffn.b1_H)), ffn.w2_DH, ffn.b2_D)


def random_ffn(
    hidden: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64, act: nn.Module | None = None
) -> FFN:
    """A random dense FFN, with entries of standard deviation 1 / sqrt(width)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / width**0.5).to(dtype)

    return FFN(draw(hidden, width), draw(hidden), draw(width, hidden), draw(width), act or nn.GELU())


def moe_layer(init: LayerInit, *, moe: MoE | None = None, tower: str = "vision") -> MoEFFN:
    """One MoE layer outside a model, without text padding."""
    moe = moe or tiny_moe(experts=len(init.experts))
    return MoEFFN(Layer(tower, 1, 2, moe.experts, moe.top_k), init.experts, init.router_ED, moe, None)  # type: ignore[arg-type]


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """That many threads for torch, one for faiss: on a busy machine two make tiny work 100 times slower."""
    before = torch.get_num_threads()
    faiss.omp_set_num_threads(1)  # first, since it sets torch's number too where they share an OpenMP
    torch.set_num_threads(number)
    assert torch.get_num_threads() == number
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cones(
    count: int, directions_ED: Tensor, seed: int, *, noise: float = 0.1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Tokens [T, D] of very different lengths around unit directions, and the number of each token's direction [T]."""
    generator = torch.Generator().manual_seed(seed)
    label_T = torch.arange(count) % len(directions_ED)
    shape = (count, directions_ED.shape[1])
    x_TD = directions_ED[label_T].double() + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    length_T1 = 0.5 + 20 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return (x_TD * length_T1).to(dtype), label_T


def orthonormal(number: int, width: int, seed: int = 0) -> Tensor:
    """Orthonormal rows [E, D], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, number, generator=generator, dtype=torch.float64)).Q.T


def heed_interrupts() -> None:
    """Let a child process be interrupted: a shell that runs the tests in the background makes it ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
