"""A protocol: everything that must be equal for a comparison. It is one TOML file, parsed into a frozen model.

    protocol = load_protocol(path, ["moe.experts=4"])       # overrides put the run into the open division
    protocol.peak_lr                                        # computed from the dense model's schedule

The table `[sources]` gives, for a dotted key, where its value comes from: a section of the paper, or a choice of ours.
The file may extend another one (`protocol_file`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from upcycle_bench.protocol_file import flatten as flatten
from upcycle_bench.protocol_file import parse_value, read_tables
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError, first_problem, unknown

Captions = Literal["text", "lines"]  # a sample's .txt is one caption, or holds one a line
TuningRule = Literal["best mean over the tuning seeds"]


class Frozen(BaseModel):
    """Base of all settings: unknown keys and coercions are errors, and nothing changes after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Schedule(Frozen):
    """AdamW over `steps` steps: linear warm-up, then linear decay to zero. Values not in the paper: OpenCLIP's."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=2, description="global batch: pairs per optimiser step over all ranks")
    warmup_fraction: float = Field(ge=0, lt=1)
    betas: tuple[float, float]
    eps: float = Field(gt=0)
    weight_decay: float = Field(
        ge=0, description="on matrices: tensors of two or more dimensions, and values that are entries of one"
    )
    grad_clip: float = Field(ge=0, description="global gradient norm; 0: off")
    patch_dropout: float = Field(ge=0, lt=1)
    augmentation: Literal["none", "random-resized-crop"]
    precision: Literal["fp32", "bf16"]
    logit_scale_max: float = Field(gt=0, description="upper clamp of the logit scale's logarithm")


class Dense(Frozen):
    """Where the dense model comes from, and the schedule in which its training was stopped."""

    source: Literal["pretrain", "shipped", "checkpoint"]
    shipped: str = Field(default="", description="sha256 of the checkpoint that ships with the package")
    lr: float = Field(gt=0, description="peak learning rate of dense pre-training")
    stop_fraction: float = Field(gt=0, le=1, description="upcycling point, as a fraction of the dense schedule")
    seed: int = Field(ge=0)
    schedule: Schedule

    @property
    def lr_at_checkpoint(self) -> float:
        """The learning rate where dense training stopped: 0.2551 `lr` at 75 % of a schedule with 2 % warm-up."""
        warmup = self.schedule.warmup_fraction
        if self.stop_fraction < warmup:
            return self.lr * self.stop_fraction / warmup
        return self.lr * (1 - self.stop_fraction) / (1 - warmup)


class Data(Frozen):
    """Training pairs (webdataset shards) and evaluation sets; for `local`, the command line gives their paths."""

    world: Literal["digits", "lab", "local"]
    seed: int = Field(ge=0, description="seed of the world's own splits")
    captions: Captions | None = Field(
        default=None, description="of local data: a .txt is one text (the default), or has one caption a line"
    )
    window: int = Field(
        default=1 << 20, ge=1, description="pairs that are shuffled together; of more, shards and blocks are shuffled"
    )
    order: Literal["permutation", "replacement"] = Field(
        default="permutation", description="an epoch has every pair once, or draws as many shards as there are"
    )
    weights: tuple[float, ...] = Field(
        default=(), description="the shares of the pairs that come from each source of --data A::B; with replacement"
    )
    bad_samples: float = Field(
        default=0.01, ge=0, le=1, description="the share of bad samples above which a training ends"
    )

    @property
    def captions_of_shards(self) -> Captions:
        """What a .txt of the training shards is; in a world that is built it has one caption a line."""
        return self.captions or ("text" if self.world == "local" else "lines")

    @model_validator(mode="after")
    def _captions_are_local(self) -> Data:
        if self.captions is not None and self.world != "local":
            raise ValueError(f"captions goes with the world local; {self.world} has its own")
        return self

    @model_validator(mode="after")
    def _weights_are_drawn(self) -> Data:
        if self.weights and self.order != "replacement":
            raise ValueError('weights needs order = "replacement"')
        if any(weight <= 0 for weight in self.weights):
            raise ValueError("weights must be above 0; leave a source out of --data instead")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, usual: Any) -> dict[str, Any]:
        """Older records and fingerprints have only the world and its seed."""
        fields = type(self).model_fields
        return {key: value for key, value in usual(self).items() if getattr(self, key) != fields[key].default}


_DATA = [f"data.{name}" for name in Data.model_fields]  # a file need not have those with a default


class MoE(Frozen):
    """DeepSpeed-MoE in every `every`-th block from `offset` on, in both towers."""

    experts: int = Field(ge=2)
    top_k: int = Field(ge=1)
    every: int = Field(ge=1)
    offset: int = Field(ge=0)
    capacity_factor: float = Field(gt=0, description="training only; DeepSpeed multiplies it by top_k")
    min_capacity: int = Field(ge=0)
    load_balance: float = Field(ge=0, description="coefficient of the load-balancing loss, summed over MoE layers")
    second_expert_sampling: bool = Field(description="DeepSpeed's Gumbel sampling of the second expert in training")
    ep_size: int = Field(ge=1, description="expert-parallel group size")

    @model_validator(mode="after")
    def _consistent(self) -> MoE:
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds experts ({self.experts})")
        if self.experts % self.ep_size:
            raise ValueError(f"experts ({self.experts}) must be divisible by ep_size ({self.ep_size})")
        return self


# arXiv:2604.13508, section 4.1, for ViT-B/32; protocols/clip-b32.toml has the same values, with a source for each.
PUBLISHED_MOE = MoE(
    experts=8,
    top_k=2,
    every=2,
    offset=1,
    capacity_factor=2.0,
    min_capacity=4,
    load_balance=0.001,
    second_expert_sampling=False,
    ep_size=1,
)


class Train(Frozen):
    """Upcycling training. Its peak learning rate is `lr_factor` times the dense one at the checkpoint."""

    lr_factor: float = Field(gt=0)
    schedule: Schedule
    zero_stage: Literal[0, 1, 2]
    log_every: int = Field(ge=1)
    checkpoint_every: int = Field(ge=0, description="steps between resumable checkpoints; 0: none")


class Tuning(Frozen):
    """How a strategy's one tuned row is chosen, the same for all strategies (`upcycle-bench tune`)."""

    protocol: str = Field(min_length=1, description="where candidates are scored: the same training, other sets")
    headline: str = Field(min_length=1, description="the headline score there that decides")
    candidates: int = Field(ge=2, description="configurations at most, the defaults among them")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the candidates' runs; no tuned row is reported on one")
    rule: TuningRule

    @model_validator(mode="after")
    def _each_seed_once(self) -> Tuning:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds must be different numbers from 0 on")
        return self


class Validation(Frozen):
    """Held-out pairs that are scored during the training, which changes no bit of it (`evaluation.held_out`)."""

    set: str = Field(min_length=1, description="a retrieval set of the world")
    pairs: int = Field(ge=2, description="evenly spaced ones of the set; all where it has fewer")
    every: int = Field(ge=0, description="steps from one score to the next; 0: none")


class Protocol(Frozen):
    """One protocol. `overrides` (`--set`) is empty in the closed division."""

    name: str
    summary: str
    model: str = Field(description="open_clip model name")
    threads: int = Field(ge=1, description="CPU threads per machine, shared by its processes")
    dense: Dense
    data: Data
    moe: MoE
    train: Train
    validation: Validation | None = None
    suites: dict[str, dict[str, Any]]
    optional_suites: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="suites that only run when --suite names them: expensive, or new"
    )
    strategies: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="options of a strategy that depend on the scale, where not its defaults"
    )
    tuning: Tuning | None = Field(default=None, description="None: nothing can be tuned under it")
    sources: dict[str, str] = Field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @property
    def peak_lr(self) -> float:
        """The peak learning rate of upcycling training."""
        return self.dense.lr_at_checkpoint * self.train.lr_factor

    @property
    def division(self) -> Literal["closed", "open"]:
        """Runs compare if they are closed; any override makes a run open."""
        return "open" if self.overrides else "closed"

    @model_serializer(mode="wrap")
    def _without_absent_tables(self, usual: Any) -> dict[str, Any]:
        """Older records lack them, and so do protocols that do not set them."""
        return {key: value for key, value in usual(self).items() if value is not None}

    @model_validator(mode="after")
    def _each_suite_once(self) -> Protocol:
        if twice := self.suites.keys() & self.optional_suites.keys():
            raise ValueError(f"suites and optional_suites both have {', '.join(sorted(twice))}")
        return self

    @model_validator(mode="after")
    def _sources_exist(self) -> Protocol:
        keys = flatten(self.model_dump(mode="json", exclude={"sources", "overrides"})) | dict.fromkeys(_DATA)
        missing = [key for key in self.sources if key not in keys]
        if missing:
            raise ValueError(f"sources names keys that do not exist: {', '.join(missing)}")
        return self


def load_protocol(path: Path, overrides: list[str] | None = None) -> Protocol:
    """Parse and validate the file `path`, with `key=value` overrides: values are TOML, and a bare word is a string.

    Raises UserError, one line, which names the key; for an unknown key, also those that exist.
    """
    tree = read_tables(path)
    tree["name"] = path.stem
    known = flatten(tree) | dict.fromkeys(_DATA)
    seen: set[str] = set()
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if key in seen:
            raise UserError(f"--set {key} is given twice; keep one.")
        seen.add(key)
        if not equals:
            raise UserError(f"--set {override!r}: write it as KEY=VALUE, for example --set moe.experts=4")
        if key not in known or key.startswith(("sources.", "name")):
            raise unknown("protocol key", key, (k for k in known if not k.startswith(("sources.", "name"))))
        table = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            table = table[parent]
        table[leaf] = parse_value(text)
        tree.get("sources", {}).pop(key, None)  # the new value has another source
    tree["overrides"] = sorted(overrides or [])
    try:
        return Protocol.model_validate_json(strict_json.dumps(tree))
    except ValidationError as error:
        where, what = first_problem(error)
        raise UserError(f"protocol {path.stem}: {where or path.stem}: {what}.") from None
    except ValueError as error:  # json cannot write nan, inf
        raise UserError(f"protocol {path.stem}: {error}") from None


def learning_rate(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up over the first `warmup_fraction` of `steps`, then linear decay to zero; `step` counts from 0.

    No step has rate 0: step t of the warm-up uses (t + 1) / warm-up, step t of the decay the rate at its start.
    """
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)
