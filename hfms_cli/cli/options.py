"""Options that more than one verb takes, so that each reads the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings to read, instead of $HFMS_CONFIG or ./hfms.toml."),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="org/name[@revision], package:NAME, ipfs://CID, a folder or a GGUF file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ServerUrl = Annotated[
    str | None,
    typer.Option("--url", help="The running server; by default the host and port of the configuration."),
]
