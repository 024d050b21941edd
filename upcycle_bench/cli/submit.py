"""`upcycle-bench submit`: records, validated and bundled for a pull request. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from upcycle_bench.cli.common import Force, Json, writable_file
from upcycle_bench.cli.validate import Sets, show_validation, validated
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError


def submit(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Records: a folder, or one file.")],
    output: Annotated[Path, typer.Option(help="The bundle to write.")] = Path("submission.tar.gz"),
    eval_data: Sets = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Validate records and bundle them, with their outcomes and metrics, for a pull request."""
    writable_file(output)
    if output.exists() and not force:
        raise UserError(f"{output} exists; --force replaces it.")
    found = validated([results], eval_data)
    if not found.sound:
        if as_json:
            print(strict_json.dumps(found.facts(), indent=2))
        else:
            show_validation(found)
        raise typer.Exit(1)
    from upcycle_bench.reporting.bundle import write_bundle

    manifest = write_bundle(found, output)
    if as_json:
        print(strict_json.dumps(manifest | {"bundle": str(output)}, indent=2))
        return
    show_validation(found)
    print(f"{output}: {len(manifest['files']):,} files of {len(found.records):,} records")
    print(f"next: in a clone of the repository, on a branch of its own: tar -xzf {output} results")
    print("      commit, open a pull request, and attach the bundle; CONTRIBUTING.md says what reviewers check")
