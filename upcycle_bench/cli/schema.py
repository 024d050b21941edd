"""`upcycle-bench schema`: the form of a record. Imports nothing heavy."""

from __future__ import annotations

import json

from upcycle_bench.cli.common import Json


def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of records."""
    from upcycle_bench.record import json_schema

    print(json.dumps(json_schema(), indent=2))
