# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune report`."""

from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOpt, Output, QuietOpt


def report(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file; otherwise report.html in the run.")
    ] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Write a run's report again: one HTML file with all that an auditor asks for."""
    from ..report import report_run

    path = report_run(run, output)
    Output(as_json, quiet).result({"report": str(path)}, [f"report: {path}"])
