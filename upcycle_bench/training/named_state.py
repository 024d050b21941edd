"""The state of a training by global names: the same, whatever the number of ranks, `ep_size` and the stage of ZeRO.

    state = collect(engine, extra)                  # this rank's share of it, copied to the CPU
    restore(engine, extra, read, names, steps, loss)    # into another engine

    model.NAME                          a parameter or a buffer
    optimizer.NAME.exp_avg@START        AdamW's moments of it, flattened, from element START on: ZeRO cuts them up
    loss.PATH                           a tensor of the strategy's own loss

In NAME and PATH local expert i of a rank is number ep_rank * (experts of a rank) + i. What several ranks have is kept
by one of them, in turns. No function here communicates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.model.moe import EXPERT_KEY, MoEFFN, moe_layers
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import PluginError

MOMENTS = ("exp_avg", "exp_avg_sq")
PLAIN = (str, int, float, bool, type(None))
EXPERT_PART = re.compile(r"experts\.(\d+)((?:\..*)?)")

Read = Callable[[Collection[str]], Mapping[str, Tensor]]  # names of a checkpoint's tensors -> the tensors, on the CPU


@dataclass
class Entry:
    """A leaf of the extra loss's state: its path, with global numbers of experts, and its value if it is no tensor."""

    path: list[str]
    value: Any = None
    is_tensor: bool = False


@dataclass
class State:
    """What one rank adds to a checkpoint. `steps` are AdamW's counts, by the parameter's global name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    loss: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Numbering:
    """Which experts of one layer this rank has: `local` of them, from number `first` on; `ep_size` ranks have all."""

    first: int
    local: int
    ep_size: int

    @classmethod
    def of(cls, layer: MoEFFN) -> Numbering:
        """That of `layer` on this rank."""
        ep_size, local = layer.settings.ep_size, len(layer.experts)
        return cls(distributed.rank() % ep_size * local, local, ep_size)

    def mine(self, number: int) -> bool:
        """Whether this rank has the expert with that global number."""
        return self.first <= number < self.first + self.local


def collect(engine: Any, extra: ExtraLoss | None) -> State:
    """This rank's share of the state, after at least one step; tensors are copies in CPU memory."""
    module = engine.module
    state, optimizer = State(), engine.optimizer
    steps = _steps(engine)
    numbering = _numbering(module)
    for place, (name, tensor) in enumerate(_tensors(module).items()):
        whole, experts = global_name(name, numbering)
        kept = _kept_here(place, experts)
        if kept:
            state.tensors[f"model.{whole}"] = _copy(tensor)
        if id(tensor) not in steps:
            continue
        state.steps[whole] = steps[id(tensor)]
        for key in MOMENTS:
            if engine.zero_optimization_stage() == 0:
                if kept:
                    state.tensors[f"optimizer.{whole}.{key}@0"] = _copy(optimizer.state[tensor][key].flatten())
            elif (mapping := tensor._hp_mapping) is not None:  # the part that lies in this rank's partition
                start = mapping.lp_fragment_address.start
                state.tensors[f"optimizer.{whole}.{key}@{start}"] = _copy(mapping.get_hp_fragment(key))
    layers = _numbering_of_layers(module)
    for place, (path, leaf) in enumerate(leaves(extra.state_dict()) if extra is not None else ()):
        everywhere, experts = _global_path(path, layers)
        is_tensor, name = isinstance(leaf, Tensor), "loss." + ".".join(everywhere)
        state.loss[name] = Entry(everywhere, None if is_tensor else leaf, is_tensor)
        if is_tensor and _kept_here(place, experts):
            state.tensors[name] = _copy(leaf)
    return state


def restore(
    engine: Any,
    extra: ExtraLoss | None,
    read: Read,
    names: Collection[str],
    steps: Mapping[str, float],
    loss: Mapping[str, Entry],
) -> None:
    """Put a checkpoint into a new engine and a new extra loss, which may have other ranks and another stage of ZeRO.

    `names` are those of all tensors in the checkpoint, `steps` and `loss` are of all its ranks.
    """
    module = engine.module
    numbering = _numbering(module)
    tensors = {global_name(name, numbering)[0]: tensor for name, tensor in _tensors(module).items()}
    values = read([f"model.{name}" for name in tensors])
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[f"model.{name}"])
            if hasattr(tensor, "_hp_mapping"):  # ZeRO's own copy
                tensor.set_full_hp_param(values[f"model.{name}"].to(tensor.device))
    stepped = {name: tensor for name, tensor in tensors.items() if name in steps and tensor.requires_grad}
    _begin_moments(engine, stepped, steps)
    pieces: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if name.startswith("optimizer."):
            whole, _, start = name.rpartition("@")
            pieces.setdefault(whole, []).append((int(start), name))
    for key in MOMENTS:
        wanted = [name for whole in stepped for _, name in pieces[f"optimizer.{whole}.{key}"]]
        values = read(wanted)
        for whole, tensor in stepped.items():
            parts = [values[name] for _, name in sorted(pieces[f"optimizer.{whole}.{key}"])]
            _set_moment(engine, tensor, key, torch.cat(parts).view(tensor.shape))
    if extra is not None and loss:
        extra.load_state_dict(_tree(module, read, loss))


def global_name(name: str, numbering: Mapping[str, Numbering]) -> tuple[str, Numbering | None]:
    """The name of a module's tensor with the global number of its expert, and the experts it belongs to, if any."""
    match = EXPERT_KEY.fullmatch(name)
    if match is None:
        return name, None
    path, number, part = match.groups()
    experts = numbering[path]
    return f"{path}.{MoEFFN.state_key(experts.first + int(number), part)}", experts


def leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a loss's state with their paths; PluginError for what a checkpoint cannot keep."""
    for key, value in tree.items():
        where = (*path, key)
        if not isinstance(key, str):
            raise PluginError(f"the loss's state_dict has the key {key!r}; a checkpoint takes names, of type str")
        if isinstance(value, Mapping):
            yield from leaves(value, where)
        elif isinstance(value, (Tensor, *PLAIN)) or (type(value) is list and all(isinstance(x, PLAIN) for x in value)):
            yield where, value
        else:
            raise PluginError(
                f"the loss's state_dict has a {type(value).__name__} at {'.'.join(where)}; a checkpoint takes tensors, "
                "numbers, texts, lists of these two, and dicts"
            )


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Parameters, those that several modules share once, and the buffers that a state dict has."""
    saved = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}


def _numbering(module: nn.Module) -> dict[str, Numbering]:
    return {name: Numbering.of(each) for name, each in module.named_modules() if isinstance(each, MoEFFN)}


def _numbering_of_layers(module: nn.Module) -> dict[str, Numbering]:
    return {name: Numbering.of(layer) for name, layer in moe_layers(module).items()}


def _kept_here(place: int, experts: Numbering | None) -> bool:
    """Whether this rank is the one of those that have a tensor, the `place`th of all, to keep it."""
    ep_size = experts.ep_size if experts else 1
    return place % (distributed.world_size() // ep_size) == distributed.rank() // ep_size


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _steps(engine: Any) -> dict[int, float]:
    """AdamW's count of steps of each parameter that it has moved, by the parameter's id."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        counts = {id(parameter): state["step"] for parameter, state in optimizer.state.items()}
    else:  # one for a whole group
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed links them once, when only its first group has some
        optimizer._lazy_init_hp_params_optimizer_state()
        counts = {
            id(parameter): optimizer.optimizer.state[flat]["step"]
            for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
            for parameter in group
        }
    values = torch.stack(list(counts.values())).tolist()  # at once: a GPU is asked once
    return dict(zip(counts, values, strict=True))


def _begin_moments(engine: Any, stepped: Mapping[str, Any], steps: Mapping[str, float]) -> None:
    """Give AdamW empty moments, and its counts of steps."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        for name, parameter in stepped.items():
            optimizer.state[parameter] = _moments(parameter, steps[name])
        return
    count_of = {id(parameter): steps[name] for name, parameter in stepped.items()}
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        # A parameter that had no gradient has fewer steps without ZeRO, which counts once for the whole group.
        count = max((count_of[id(parameter)] for parameter in group if id(parameter) in count_of), default=0.0)
        optimizer.optimizer.state[flat] = _moments(flat, count)
    optimizer._lazy_init_hp_params_optimizer_state()


def _moments(parameter: Tensor, steps: float) -> dict[str, Tensor]:
    """AdamW's state of a parameter, as torch makes it where `fused`."""
    count = torch.tensor(steps, dtype=torch.float32, device=parameter.device)
    return {"step": count} | {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}


def _set_moment(engine: Any, parameter: Any, key: str, value: Tensor) -> None:
    if engine.zero_optimization_stage() == 0:
        engine.optimizer.state[parameter][key].copy_(value)
    else:
        parameter.set_full_hp_param(value.to(parameter.device), key)


def _global_path(path: Sequence[str], layers: Mapping[str, Numbering]) -> tuple[list[str], Numbering | None]:
    """The path with the global number of its expert, in a table under a layer's name: `experts.I.` or `experts`, I."""
    found = _expert_place(path, layers)
    if found is None:
        return list(path), None
    place, number, experts = found
    return _renumbered(path, place, number + experts.first), experts


def _expert_place(path: Sequence[str], layers: Mapping[str, Numbering]) -> tuple[int, int, Numbering] | None:
    """Where in the path an expert's number stands, the number, and the experts of that layer; None if nowhere."""
    for place, part in enumerate(path[:-1]):
        if part not in layers:
            continue
        if match := EXPERT_PART.fullmatch(path[place + 1]):
            return place + 1, int(match[1]), layers[part]
        if path[place + 1] == "experts" and place + 2 < len(path) and path[place + 2].isdecimal():
            return place + 2, int(path[place + 2]), layers[part]
    return None


def _renumbered(path: Sequence[str], place: int, number: int) -> list[str]:
    new = EXPERT_PART.sub(rf"experts.{number}\2", path[place]) if path[place].startswith("experts.") else str(number)
    return [*path[:place], new, *path[place + 1 :]]


def _tree(module: nn.Module, read: Read, loss: Mapping[str, Entry]) -> dict[str, Any]:
    """The state of the extra loss on this rank, with local numbers of experts."""
    layers = _numbering_of_layers(module)
    here: dict[str, list[str]] = {}  # of the entries that this rank has, their path
    for name, entry in loss.items():
        found = _expert_place(entry.path, layers)
        if found is None:
            here[name] = entry.path
        elif found[2].mine(found[1]):
            here[name] = _renumbered(entry.path, found[0], found[1] - found[2].first)
    values = read([name for name in here if loss[name].is_tensor])
    tree: dict[str, Any] = {}
    for name, path in here.items():
        table = tree
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = values[name] if loss[name].is_tensor else loss[name].value
    return tree
