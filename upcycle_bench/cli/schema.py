"""`upcycle-bench schema`: the form of a record. Imports nothing heavy."""

from __future__ import annotations

from upcycle_bench.cli.common import Json
from upcycle_bench.util import strict_json


def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of records."""
    from upcycle_bench.record import json_schema

    print(strict_json.dumps(json_schema(), indent=2))
