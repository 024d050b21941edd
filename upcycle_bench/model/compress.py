"""DeRS compression of trained weights (arXiv:2503.01359): W_i = W_base + Delta_i, with a cheaper Delta_i.

    report = compress(checkpoint, base, Sparsify(rate=0.9), output)

W_base is the dense model's weight, Delta_i what expert i has learnt since. `Sparsify` drops each entry of Delta_i with
probability p and divides the others by 1 - p (DARE), so that its mean stays. `Quantise` gives each entry k bits.

The output holds the decompressed values: an ordinary checkpoint, which can be scored. The sizes in the report follow
the paper's formulas for the experts' matrices. For one of O x I weights `Sparsify` keeps (1 + E (1 - p)) O I
numbers; `Quantise` keeps (32 + E k) O I bits.

The paper does not state its quantiser. Ours has 2^k values s {-(2^k - 1), ..., -1, 1, ..., 2^k - 1} for each matrix.
Alternating optimisation finds the step s of least squared error; k = 32 keeps the numbers.

Shape suffixes: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from upcycle_bench.model import weights
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.state_dict import require_finite
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import atomic, file_sha256
from upcycle_bench.util.rng import Stream

FULL_BITS = 32  # bits of a number in our checkpoints

Array = NDArray[np.float64]


class Method(Protocol):
    """A way to compress the difference between an expert's matrix and the dense one."""

    def apply(self, delta_OI: Array, rng: Stream) -> Array:
        """The difference after compression and decompression, float64 [O, I]."""

    def bits(self, experts: int) -> float:
        """Bits per weight of the dense matrix, itself included, for that many experts."""


@dataclass(frozen=True)
class Sparsify:
    """Drop entries with probability `rate` and divide the others by 1 - rate (DARE, arXiv:2311.03099)."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"--rate {self.rate}: give the share of entries to drop, from 0 to less than 1.")

    def apply(self, delta_OI: Array, rng: Stream) -> Array:
        draws = torch.rand(delta_OI.shape, generator=rng.generator(), dtype=torch.float64).numpy()
        return np.where(draws >= self.rate, delta_OI / (1 - self.rate), 0.0)

    def bits(self, experts: int) -> float:
        return (1 + experts * (1 - self.rate)) * FULL_BITS


@dataclass(frozen=True)
class Quantise:
    """Round each entry to one of 2^`bits_per_weight` values."""

    bits_per_weight: int

    def __post_init__(self) -> None:
        if not (1 <= self.bits_per_weight <= 16 or self.bits_per_weight == FULL_BITS):
            raise UserError(f"--bits {self.bits_per_weight}: give 1 to 16, or {FULL_BITS} to keep the numbers.")

    def apply(self, delta_OI: Array, rng: Stream) -> Array:
        if self.bits_per_weight == FULL_BITS or not delta_OI.any():
            return delta_OI
        top = 2**self.bits_per_weight - 1
        # The optimisation finds a local minimum. A fine quantiser should begin with a step that reaches the largest
        # entry, a coarse one with a step that cuts it off.
        starts = np.abs(delta_OI).max() / top, 2 * np.sqrt(np.square(delta_OI).mean()) / top
        candidates = [_fitted(delta_OI, start, top) for start in starts]
        return min(candidates, key=lambda quantised: np.square(quantised - delta_OI).sum())

    def bits(self, experts: int) -> float:
        return FULL_BITS + experts * self.bits_per_weight


def _fitted(delta_OI: Array, step: float, top: int, rounds: int = 20) -> Array:
    """Quantised values: the best codes for a step and the best step for the codes in turn; the error never grows."""
    for _ in range(rounds):
        # Codes are odd numbers from -top to top, so that neighbouring values lie 2 steps apart.
        code_OI = np.clip(2 * np.floor(delta_OI / (2 * step)) + 1, -top, top)
        step = float((delta_OI * code_OI).sum() / np.square(code_OI).sum())
    return step * code_OI


def compress(checkpoint: Path, base: Path, method: Method, output: Path, seed: int = 0) -> dict[str, Any]:
    """Compress the experts of `checkpoint`, a file of `weights.save`; `base` has the dense weights. Returns a report.

    Writes `output` whole or not at all, for `weights.load`. Raises UserError for a file of another kind.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    clip = weights.load(checkpoint)
    layers = moe_layers(clip.model)
    if not layers:
        raise UserError(f"{checkpoint}: a dense model has no experts to compress.")
    dense = create_clip(clip.name, base).model.state_dict()
    state = clip.model.state_dict()
    size, size_before, size_after = 0, 0.0, 0.0
    error, energy = 0.0, 0.0
    for name, layer in layers.items():
        path, experts = layer.place.mlp_path, layer.place.num_experts
        for part in ("c_fc.weight", "c_proj.weight"):
            base_OI = dense[f"{path}.{part}"].double().numpy()
            for number in range(experts):
                key = f"{path}.{layer.state_key(number, part)}"
                if tuple(state[key].shape) != base_OI.shape:
                    raise UserError(
                        f"{checkpoint}: experts of {tuple(state[key].shape)} at {name} are no versions of the dense "
                        f"{base_OI.shape}; only experts of the dense FFN's size have a difference to compress."
                    )
                delta_OI = state[key].double().numpy() - base_OI
                cheap_OI = method.apply(delta_OI, Stream(("compress", seed, name, number, part)))
                state[key] = torch.from_numpy(base_OI + cheap_OI).to(state[key].dtype)
                error += float(np.square(cheap_OI - delta_OI).sum())
                energy += float(np.square(delta_OI).sum())
            size += base_OI.size
            size_before += experts * base_OI.size * FULL_BITS / 8
            size_after += method.bits(experts) * base_OI.size / 8
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    require_finite(state, output, "nothing was written: choose a milder compression")
    with atomic(output) as target:
        save_file({key: value.contiguous() for key, value in state.items()}, target, metadata=metadata)
    return {
        "method": {"name": type(method).__name__.lower(), **asdict(method)},  # type: ignore[call-overload]
        "output": str(output),
        "sha256": file_sha256(output),
        "expert_matrix_bytes": round(size_before),
        "compressed_bytes": round(size_after),
        "ratio": size_before / size_after,
        "relative_error_of_deltas": (error / energy) ** 0.5 if energy else 0.0,
    }
