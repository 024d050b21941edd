"""Experts that were made, kept in the work folder: a training that goes on neither calibrates nor prepares again.

    keep(folder, made, dense)               # by rank 0
    found = look_up(folder, dense)          # None: nothing is kept there, or it is damaged

    folder/experts.safetensors              experts and routers, and the model they go into, if a preparation made it
    folder/receipt.json                     its hash, the step-0 receipt, and what the phases before cost

Only plain FFNs with the dense activation are kept; a file holds no code, so others are made again.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from upcycle_bench.model.ffn import FFN, LayerInit, alike
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.protocol import MoE
from upcycle_bench.record_schema import Part, PhaseCost
from upcycle_bench.util import strict_json
from upcycle_bench.util.files import atomic, file_sha256, write_atomically
from upcycle_bench.util.meter import Phase

PARTS = ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")


@dataclass(frozen=True)
class Made:
    """What a strategy made of the dense model. `base`: the model that the experts go into."""

    base: Any
    inits: Mapping[str, LayerInit]
    receipt: dict[str, Any]
    phases: Mapping[str, Phase]


class _Receipt(Part):
    sha256: str
    receipt: dict[str, Any]
    phases: dict[str, PhaseCost]


def keep(folder: Path, made: Made, dense: Any, moe: MoE) -> bool:
    """Write what was made, the receipt last; returns False where the experts are no plain FFNs."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for layer in find_layers(dense, moe):
        init, ffn = made.inits[layer.name], FFN.of(dense.get_submodule(layer.mlp_path))
        if not alike([ffn.expert(), *init.experts]):
            return False
        tensors[f"{layer.name}/router"] = init.router_ED
        for number, expert in enumerate(init.experts):
            tensors |= {f"{layer.name}/{number}/{name}": tensor for name, tensor in expert.state_dict().items()}
    if made.base is not dense:
        tensors |= {f"base/{name}": tensor for name, tensor in made.base.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "experts.safetensors"
    with atomic(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    phases = {name: asdict(phase) for name, phase in made.phases.items()}
    facts = {"sha256": file_sha256(path), "receipt": made.receipt, "phases": phases}
    write_atomically(folder / "receipt.json", (strict_json.dumps(facts, indent=1) + "\n").encode())
    return True


def look_up(folder: Path, dense: Any, moe: MoE) -> Made | None:
    """What was kept of this dense model, on its device; None unless it is whole. What is damaged is deleted."""
    from safetensors.torch import load_file

    receipt, path = folder / "receipt.json", folder / "experts.safetensors"
    if not receipt.is_file():
        return None
    try:
        facts = _Receipt.model_validate_json(receipt.read_bytes())
        tensors = load_file(path) if file_sha256(path) == facts.sha256 else None
    except (OSError, ValidationError, SafetensorError):
        tensors = None
    if tensors is None:
        shutil.rmtree(folder)
        return None
    base = dense
    if own := {name.removeprefix("base/"): tensor for name, tensor in tensors.items() if name.startswith("base/")}:
        base = copy.deepcopy(dense)
        base.load_state_dict(own)
    inits = {}
    for layer in find_layers(dense, moe):
        ffn, device = FFN.of(dense.get_submodule(layer.mlp_path)), next(dense.parameters()).device
        experts = []
        for number in range(layer.num_experts):
            w1, b1, w2, b2 = (tensors[f"{layer.name}/{number}/{name}"].to(device) for name in PARTS)
            experts.append(FFN(w1, b1, w2, b2, ffn.act).expert())
        inits[layer.name] = LayerInit(experts, tensors[f"{layer.name}/router"].to(device))
    phases = {name: Phase(**cost.model_dump()) for name, cost in facts.phases.items()}
    return Made(base, inits, facts.receipt, phases)


def on_cpu(init: LayerInit) -> LayerInit:
    """The same in CPU memory."""
    return replace(init, experts=[expert.cpu() for expert in init.experts], router_ED=init.router_ED.cpu())
