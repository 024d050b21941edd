"""The command line: parses, calls, shows; the work is done in the rooms below, none of which imports this package.

`main` is the entry point of `upcycle-bench`, `app` is what typer makes of all commands.
"""

from upcycle_bench.cli.main import app, main

__all__ = ["app", "main"]
