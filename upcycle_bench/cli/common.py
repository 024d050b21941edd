"""What the commands share: options, checks of arguments, the end of a command. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.planning.registry import Registry
    from upcycle_bench.protocol import Protocol
    from upcycle_bench.util.progress import Reporter

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]

Strategies = Annotated[
    str, typer.Option("--strategy", "-s", help="Which strategies: one, a,b,c or all; see `list strategies`.")
]
ProtocolName = Annotated[str, typer.Option("--protocol", "-p", help="Which protocol; see `list protocols`.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="A strategy's option, tau=0.8.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override the protocol, moe.experts=4: open division."),
]
Data = Annotated[
    str | None,
    typer.Option(help="Training shards (clip-*): a folder, train/{000..127}.tar, A::B, s3://..., or synthetic."),
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="FILE|FOLDER|TAG", help="The dense weights (clip-*): also hf-hub:ORG/NAME.")
]
PixelSettings = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="What images the weights expect: mean=0.5,0.5,0.5, resize-mode=squash."),
]
Interpolate = Annotated[
    bool, typer.Option("--interpolate-positions", help="Resize position embeddings of another size; recorded.")
]
LogEvery = Annotated[
    int, typer.Option(min=1, metavar="N", help="Without a terminal: a line each N steps at most; else at all logged.")
]
Track = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Log to a,b of tensorboard, wandb and csv, beside the record.")
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes on each rank that load batches; 4 for a GPU, 0 for a CPU.")
]
Prefetch = Annotated[int, typer.Option(min=1, help="Batches that they load ahead.")]
EvalData = Annotated[Path | None, typer.Option(help="Folder with the evaluation sets (clip-*).")]
StopAfter = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Write a checkpoint and end with status 75 after 90s, 45m, 3h50m, 1-02:00:00."),
]
Suites = Annotated[
    str | None,
    typer.Option("--suite", help="Which of the protocol's suites: a,b or all; else those that are not optional."),
]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection, for imports: they make many objects and no garbage, and it takes a fifth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def resumable(then: str, until: float | None = None) -> Iterator[None]:
    """As `interruptible`, for what the same command goes on with: SIGTERM, SIGUSR1 and `--stop-after` end it with 75.

    `until` is when it is to stop, by the clock `time.monotonic`.
    """
    from upcycle_bench.training.stopping import STATUS, Stopped, stoppable

    try:
        with stoppable(until):
            yield
    except Stopped as stopped:
        if is_main():
            after = f" after step {stopped.step}" if stopped.step else ""
            print(f"stopped by {stopped.by}{after}: {then}", file=sys.stderr)
        raise typer.Exit(STATUS) from None
    except KeyboardInterrupt:
        if is_main():
            print(f"interrupted: {then}", file=sys.stderr)
        raise typer.Exit(130) from None


def going_on(runs: int, fresh: bool) -> str:
    """How to go on with so many runs, for `resumable`."""
    then = GOES_ON if runs == 1 else "the same command goes on with what is missing"
    return then.replace("command", "command without --fresh") if fresh else then


def stop_time(stop_after: str | None) -> float | None:
    """When `--stop-after` ends, by the clock `time.monotonic`; UserError for what is no time."""
    from upcycle_bench.training.stopping import seconds

    return None if stop_after is None else time.monotonic() + seconds(stop_after)


@contextlib.contextmanager
def interruptible(then: str) -> Iterator[None]:
    """Ctrl-C, or the SIGTERM of a cluster, ends the command with 130; `then` says what becomes of its work."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        if is_main():
            print(f"interrupted: {then}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: the handler was not set by Python


def terminal_reporter(log_every: int = 1) -> Reporter:
    """Progress for rank 0: bars on a terminal, else lines, of a training at most one in `log_every` steps.

    Silence for the other ranks.
    """
    from upcycle_bench.util.log_lines import LineReporter
    from upcycle_bench.util.progress import Reporter, TerminalReporter

    if not is_main():
        return Reporter()
    return TerminalReporter() if sys.stderr.isatty() else LineReporter(log_every)


def check_output(output: Path) -> None:
    """UserError for a file name without .safetensors and for a folder that takes no file, before any work."""
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: give a file name that ends in .safetensors.")
    writable_file(output)


def writable_file(output: Path) -> None:
    """UserError where the folder of `output` is missing or read-only, and where it is a folder or a device."""
    from upcycle_bench.util.files import require_ordinary

    writable_place(output)
    require_ordinary(output)


def writable_place(output: Path) -> None:
    """UserError where the folder of `output` is missing or read-only."""
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: {output.absolute().parent} is not a folder; make it, or choose another.")
    from upcycle_bench.util.files import require_writable

    require_writable(output.absolute().parent, "--output")


def refuse_existing(output: Path, force: bool) -> None:
    """UserError where the file exists and `force` does not say to replace it."""
    if output.exists() and not force:
        raise UserError(f"--output {output}: there is such a file; --force replaces it.")


def require_one_process(command: str) -> None:
    """UserError under torchrun with several processes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{command} is the work of one process; start it without torchrun.")


def is_main() -> bool:
    """Whether this is rank 0, which writes and prints; from torchrun's environment, without importing torch."""
    return os.environ.get("RANK", "0") == "0"


def key_value(text: str, option: str = "--option") -> tuple[str, str]:
    """The two parts of a strategy's option, tau=0.8."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{option} {text!r}: write it as KEY=VALUE, for example {option} tau=0.8")
    return key, value


def written_out(context: typer.Context, without: Container[str]) -> list[str]:
    """The options that were given to a command, as arguments again, for other processes of the same command."""
    written: list[str] = []
    for option in context.command.params:
        name, value = option.name or "", context.params.get(option.name or "")
        source = context.get_parameter_source(name)
        if name in without or source is None or source.name == "DEFAULT":
            continue
        values = [None] if value is True else value if isinstance(value, list | tuple) else [value]
        for each in values:
            written += [max(option.opts, key=len)] + ([] if each is None else [str(each)])
    return written


def names_of(text: str | None, option: str) -> list[str]:
    """The names of a,b,c, or no name where the option was not given. UserError for an empty name."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"{option} {text!r}: a name is empty; write {option} NAME or {option} A,B.")
    return names


def trackers_named(text: str | None) -> list[str]:
    """The trackers of --track. UserError for an unknown one, and for one that is not installed."""
    names = names_of(text, "--track")
    if names:
        from upcycle_bench.training.trackers import require

        require(names)
    return names


def open_registry() -> Registry:
    """All plugins; those that do not load are named on the terminal."""
    with uncollected():
        from upcycle_bench.planning.registry import load_registry

        registry = load_registry()
    warn_broken(registry.broken)
    return registry


def warn_broken(broken: dict[str, str]) -> None:
    """Name the plugins that did not load, and why."""
    if is_main():
        for plugin, reason in broken.items():
            print(f"warning: plugin {plugin} did not load: {reason}", file=sys.stderr)


def warn_emulated(protocol: Protocol) -> None:
    """Say it where a bf16 protocol trains on a CPU without bf16 instructions. The precision stays what it is."""
    from upcycle_bench.planning.machine import cpu_bf16
    from upcycle_bench.util.distributed import choose_device

    wanted = protocol.train.schedule.precision == "bf16"
    if wanted and is_main() and choose_device().type == "cpu" and not cpu_bf16():
        print(
            "warning: this CPU has no bf16 instructions, so torch emulates them, slowly; the protocol lab-fp32 does "
            "without.",
            file=sys.stderr,
        )


GOES_ON = "the same command goes on from what was finished and from the last checkpoint, if there is one"
