"""The command line: each command has a file, and is registered here.

Heavy imports stand inside the commands, so that `--help` is instant. Results go to stdout, progress and errors to
stderr. With `--json` a command prints one JSON document on stdout and nothing else there.
Exit status: 0 done, 1 the run failed (its record says why), 2 bad input, 75 stopped and the same command goes on
(`training.stopping`), 130 Ctrl-C.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from upcycle_bench.cli import cache, data
from upcycle_bench.cli.agree import agree
from upcycle_bench.cli.common import is_main
from upcycle_bench.cli.compress import compress
from upcycle_bench.cli.diff import diff
from upcycle_bench.cli.doctor import doctor
from upcycle_bench.cli.evaluate import evaluate
from upcycle_bench.cli.experts import experts
from upcycle_bench.cli.latency import latency
from upcycle_bench.cli.launch import launch
from upcycle_bench.cli.leaderboard import leaderboard
from upcycle_bench.cli.listing import list_
from upcycle_bench.cli.plot import plot
from upcycle_bench.cli.power import power
from upcycle_bench.cli.pretrain import pretrain
from upcycle_bench.cli.receipt import receipt
from upcycle_bench.cli.reproduce import reproduce
from upcycle_bench.cli.run import run
from upcycle_bench.cli.schema import schema
from upcycle_bench.cli.submit import submit
from upcycle_bench.cli.tune import tune
from upcycle_bench.cli.upcycle import upcycle
from upcycle_bench.cli.validate import validate
from upcycle_bench.util.errors import UserError, plain
from upcycle_bench.util.files import disk_is_full
from upcycle_bench.util.launchers import settle
from upcycle_bench.util.rendezvous import require_sound

QUOTE = "put a range of shards into quotes, so that the shell leaves it whole: 'train/{000..127}.tar'"
# A pattern in what typer says of a command line, and what it may come from.
HINTS = (
    (r"extra argument.*\.tar\b", f" To name several shards, {QUOTE}."),
    (r"extra argument", " An option before it may lack its value."),
    (r"^upcycle-bench: No such option", " Options stand behind their command: upcycle-bench run --strategy ..."),
)

app = typer.Typer(
    name="upcycle-bench",
    help="A fair benchmark of ways to turn a dense CLIP into a mixture of experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")
app.command()(run)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(launch)
app.command()(tune)
app.command()(receipt)
app.command()(pretrain)
app.command()(compress)
app.command()(upcycle)
app.command()(evaluate)
app.command()(plot)
app.command()(latency)
app.command()(experts)
app.command("list")(list_)
app.command()(leaderboard)
app.command()(power)
app.command()(agree)
app.command()(diff)
app.command()(validate)
app.command()(reproduce)
app.command()(submit)
app.command()(schema)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from upcycle_bench import __version__

        print(f"upcycle-bench {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: one line for bad input, no traceback."""
    try:
        sys.argv[1:] = settle(sys.argv[1:], os.environ)
        _refuse_twice(sys.argv[1:])
        require_sound()  # before RANK says who prints
        sys.exit(app(prog_name="upcycle-bench", standalone_mode=False) or 0)
    except UserError as error:
        print(f"error: {error}" if is_main() else f"error (rank {os.environ['RANK']}): {error}", file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:
        if not disk_is_full(error):
            raise
        print(f"error: {error.filename or 'a file'}: no space is left on its disk; free some.", file=sys.stderr)
        sys.exit(1)
    except typer.Abort:
        sys.exit(130)
    except typer.TyperException as error:  # a missing or bad option, an unknown command
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "upcycle-bench"
        message = " ".join(plain(error.format_message()).split())
        if message:  # a bare command has no message, since typer has printed its help
            end = "" if message.endswith((".", "?")) else "."
            hint = next((hint for pattern, hint in HINTS if re.search(pattern, f"{path}: {message}")), "")
            message = re.sub(r"(extra argument\S*) \((\S+ \S+ \S+) .*\)", r"\1 (\2 and more)", message)
            print(f"error: {path}: {message}{end}{hint} See: {path} --help", file=sys.stderr)
        sys.exit(2)


def _refuse_twice(arguments: Sequence[str]) -> None:
    """UserError for shards given twice, as a shell expands --data=train/{0..9}.tar: typer would take the last one."""
    for option in ("--data", "--calibration"):
        times = sum(argument.partition("=")[0] == option for argument in arguments)
        if times > 1:
            raise UserError(f"{option} is given {times} times; {QUOTE}.")
