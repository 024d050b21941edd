"""`upcycle-bench compress`: make trained experts smaller. Imports nothing heavy."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from upcycle_bench.cli.common import Force, Json, check_output, refuse_existing
from upcycle_bench.util import strict_json


class Compression(str, Enum):
    """How `compress` makes experts smaller."""

    sparsify = "sparsify"
    quantise = "quantise"


def compress(
    checkpoint: Annotated[
        Path, typer.Argument(help="Trained weights of ours, FILE.safetensors, or the record of a run.")
    ],
    base: Annotated[Path, typer.Option(help="The dense open_clip model that they were made of.")],
    output: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the decompressed weights go.")],
    method: Annotated[Compression, typer.Option(help="What becomes of each expert's difference to the base.")],
    rate: Annotated[float, typer.Option(help="sparsify: the share of entries to drop.")] = 0.9,
    bits: Annotated[int, typer.Option(help="quantise: bits per entry, 1 to 16; 32 keeps all.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="sparsify: which entries go.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress trained experts as DeRS does, and say how small they are."""
    from upcycle_bench.model.compress import Quantise, Sparsify
    from upcycle_bench.model.compress import compress as execute

    if checkpoint.suffix == ".json":
        checkpoint = _of_record(checkpoint)
    check_output(output)
    refuse_existing(output, force)
    chosen = Sparsify(rate) if method is Compression.sparsify else Quantise(bits)
    report = execute(checkpoint, base, chosen, output, seed)
    if as_json:
        print(strict_json.dumps(report, indent=2))
        return
    before, after = (report[key] / 1e6 for key in ("expert_matrix_bytes", "compressed_bytes"))
    print(f"experts' matrices: {before:,.2f} MB -> {after:,.2f} MB, {report['ratio']:.2f} times smaller")
    print(f"relative error of the differences: {report['relative_error_of_deltas']:.3g}")
    print(f"decompressed weights: {output}")


def _of_record(path: Path) -> Path:
    """The weights of a record, in the cache."""
    from upcycle_bench import record
    from upcycle_bench.model import weights

    return weights.of_record(path, record.read(path).hashes.weights)
