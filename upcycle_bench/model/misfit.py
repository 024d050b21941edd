"""Why do weights not fit a model, and what is there to do? Both sides are shown, then the first reason that is known.

    require_fit(Sides(path, "ViT-B-32", found, wanted))     # UserError unless names and shapes are the same

`REASONS` has a row for each; docs/checkpoints.md shows the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from upcycle_bench.model.checkpoint_file import index_of
from upcycle_bench.model.lookalike import names_of_shape
from upcycle_bench.util.errors import UserError


@dataclass(frozen=True)
class Sides:
    """The tensors that a file has and those that the model `name` wants; `quick_gelu`: what the file says."""

    path: Path
    name: str
    found: Mapping[str, Tensor]
    wanted: Mapping[str, Tensor]
    quick_gelu: bool | None = None

    @cached_property
    def missing(self) -> list[str]:
        return [key for key in self.wanted if key not in self.found]

    @cached_property
    def superfluous(self) -> list[str]:
        return [key for key in self.found if key not in self.wanted]

    @cached_property
    def reshaped(self) -> list[str]:
        both = [key for key in self.wanted if key in self.found]
        return [key for key in both if self.found[key].shape != self.wanted[key].shape]

    @property
    def misfits(self) -> list[str]:
        return [*self.missing, *self.superfluous, *self.reshaped]


@dataclass(frozen=True)
class Reason:
    """What the file is, told by `fits`, and what to do."""

    what: str
    fits: Callable[[Sides], bool]
    remedy: str


def require_fit(sides: Sides) -> None:
    """UserError that shows both sides, unless names and shapes are the same."""
    if not sides.misfits:
        return
    parts = [_counted(sides.missing, "missing"), _counted(sides.superfluous, "unexpected")]
    if sides.reshaped:
        key = sides.reshaped[0]
        shapes = f"{shape(sides.found[key])}, not {shape(sides.wanted[key])}"
        parts.append(f"{_counted(sides.reshaped, 'of other shape')} {shapes}")
    raise UserError(
        f"checkpoint {sides.path} does not fit {sides.name}: it has {len(sides.found)} tensors, the model "
        f"{len(sides.wanted)}; {'; '.join(filter(None, parts))}. {_remedy(sides)}"
    )


def shape(tensor: Tensor) -> str:
    """`197x768`."""
    return "x".join(map(str, tensor.shape)) or "scalar"


def _remedy(sides: Sides) -> str:
    if index := index_of(sides.path):
        return f"The file is one part of several: give {index}."
    if reason := next((reason for reason in REASONS if reason.fits(sides)), None):
        return f"It holds {reason.what}: {reason.remedy}."
    names = names_of_shape(sides.found, sides.quick_gelu)
    if names and sides.name not in names:
        return f"Its shapes are those of {' or '.join(names)}: give that model."
    return "Give the model whose weights they are."


def _counted(keys: Iterable[str], what: str) -> str:
    keys = list(keys)
    return f"{len(keys)} {what}, first {keys[0]}" if keys else ""


def _ends(sides: Sides, *ends: str) -> bool:
    return any(key.endswith(ends) for key in sides.superfluous)


def _longer_vocabulary(sides: Sides) -> bool:
    key = next((key for key in sides.misfits if key.endswith("token_embedding.weight")), "")
    found, wanted = sides.found.get(key), sides.wanted.get(key)
    if sides.misfits != [key] or found is None or wanted is None:
        return False
    return found.shape[1:] == wanted.shape[1:] and len(found) > len(wanted)


REASONS = (
    Reason(
        "no values, since ZeRO-3 spreads them over its partitions",
        lambda sides: sum(value.numel() == 0 for value in sides.found.values()) > len(sides.found) / 2,
        "run zero_to_fp32.py, which DeepSpeed writes beside the checkpoint, and give what it makes",
    ),
    Reason(
        "weights with LoRA's beside them",
        lambda sides: any("lora_" in key or ".base_layer." in key for key in sides.superfluous),
        "merge them first (PEFT: model.merge_and_unload()), and save model.state_dict()",
    ),
    Reason(
        "weights as length and direction (GmP)",
        lambda sides: _ends(sides, "c_fc.r", "c_fc.theta", "c_proj.r", "c_proj.theta"),
        "turn them back into .weight by the script of that training",
    ),
    Reason(
        "more tokens than the model's vocabulary",
        _longer_vocabulary,
        "tokens were added, and CLIP's pooling would take their ids for the end of the text; remove their rows, or "
        "describe the model in a JSON file with its vocab_size, pool_type and eos_id",
    ),
    Reason(
        "one tower alone",
        lambda sides: (
            not sides.superfluous
            and (
                not any(key.startswith("visual.") for key in sides.found)
                or all(key.startswith("visual.") for key in sides.found)
            )
        ),
        "give the file of the whole model",
    ),
    Reason(
        "position embeddings of another grid or context length, and else the model's weights",
        lambda sides: (
            sides.misfits == sides.reshaped and all(key.endswith("positional_embedding") for key in sides.misfits)
        ),
        "--interpolate-positions resizes them, which is recorded",
    ),
)
