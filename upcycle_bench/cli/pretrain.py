"""`upcycle-bench pretrain`: train the dense model of a protocol into the cache. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from upcycle_bench.cli.common import (
    GOES_ON,
    Data,
    Json,
    LogEvery,
    Prefetch,
    StopAfter,
    Track,
    Workers,
    check_output,
    is_main,
    open_registry,
    resumable,
    stop_time,
    terminal_reporter,
    trackers_named,
)
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError


def pretrain(
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="Whose dense model; see `list protocols`.")] = "lab",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override the protocol, dense.seed=1.")
    ] = None,
    data: Data = None,
    workers: Workers = None,
    prefetch: Prefetch = 2,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Write it there too, in half precision.")
    ] = None,
    log_every: LogEvery = 1,
    track: Track = None,
    stop_after: StopAfter = None,
    as_json: Json = False,
) -> None:
    """Train the dense model of a protocol by its recipe, into the cache."""
    from upcycle_bench.data.batches import Loading
    from upcycle_bench.planning.plan import Paths, find_world
    from upcycle_bench.protocol import load_protocol
    from upcycle_bench.training.pretrain import export, pretrain_once
    from upcycle_bench.util.distributed import check_world

    settings = load_protocol(open_registry().get("protocol", protocol).target, overrides)
    if settings.data.world == "local" and data is None:
        raise UserError(f"protocol {settings.name} has no data of its own; give --data, webdataset shards to train on.")
    if output is not None:
        check_output(output)
    check_world(settings.dense.schedule.batch_size, ep_size=1)
    reporter, trackers, until = terminal_reporter(log_every), trackers_named(track), stop_time(stop_after)
    with resumable(GOES_ON, until):
        world = find_world(settings, Paths(data=data), reporter)
        path, trained = pretrain_once(settings, world, reporter, trackers, Loading(workers, prefetch))
    if is_main():
        half = export(path, output) if output else None
        show_dense(path, trained, output, half, as_json)


def show_dense(path: Path, trained: bool, output: Path | None, half: str | None, as_json: bool) -> None:
    """A dense model of the cache, from the .json beside it; `half`: sha256 of its half-precision copy `output`."""
    facts = json.loads(path.with_suffix(".json").read_text())
    if as_json:
        copy = {"output": str(output), "output sha256": half} if output else {}
        print(strict_json.dumps({**facts, "checkpoint": str(path), "trained": trained, **copy}, indent=2))
        return
    steps = facts["samples"] // facts["dense"]["schedule"]["batch_size"]
    loss, seconds = facts["last metrics"].get("loss", float("nan")), facts["cost"]["seconds"]
    if not trained:
        print(f"in the cache already, from {facts['created']}; nothing was trained")
    print(f"dense model of {facts['protocol']}: {steps:,} steps, last loss {loss:.4f}, {seconds:,.1f} s")
    print(f"sha256: {facts['sha256']}")
    print(f"checkpoint: {path}")
    if output:
        print(f"half precision: {output}, sha256 {half}")
