"""Options that several commands of the command line share, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]

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
Data = Annotated[str | None, typer.Option(help="Training shards (clip-*): a folder, or train/{000..127}.tar.")]
Checkpoint = Annotated[Path | None, typer.Option(help="The dense open_clip model (clip-*).")]
EvalData = Annotated[Path | None, typer.Option(help="Folder with the evaluation sets (clip-*).")]
Suites = Annotated[
    str | None,
    typer.Option("--suite", help="Which of the protocol's suites: a,b or all; else those that are not optional."),
]
