# SPDX-License-Identifier: Apache-2.0
"""`dsv4-finetune`: check data, train adapters, evaluate them, merge them.

Results go to standard output, one line each or one JSON object; everything else goes to standard
error. Exit codes: 0 success, 1 failure with one line of reason, 2 wrong usage.
"""

import sys
import warnings
from collections.abc import Callable

import typer
from rich.console import Console

from .commands.check import check
from .commands.evaluate import evaluate
from .commands.inspect import inspect
from .commands.lr_find import lr_find
from .commands.merge import merge
from .commands.plan import plan
from .commands.report import report
from .commands.train import train

app = typer.Typer(
    help="Low-rank fine-tuning of dsv4 models, plain and quantized.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# In the order of a user's day; the help shows them so.
app.command(epilog="Example: dsv4-finetune check private.jsonl --model nano")(check)
app.command("lr-find", epilog="Example: dsv4-finetune lr-find --model nano --data my.jsonl")(
    lr_find
)
app.command(epilog="Example: dsv4-finetune plan v4-flash --vram 32GB --ram 192GB")(plan)
app.command(epilog="Example: dsv4-finetune train --model nano --data my.jsonl --output adapter")(
    train
)
app.command(
    "eval", epilog="Example: dsv4-finetune eval --model nano --adapter out --data my.jsonl"
)(evaluate)
app.command(epilog="Example: dsv4-finetune merge --model nano --adapter out --output merged")(merge)
app.command(epilog="Example: dsv4-finetune inspect out --json")(inspect)
app.command(epilog="Example: dsv4-finetune report out")(report)


def run(call: Callable[[], None]) -> int:
    """Run a program: failures become one line on standard error and exit code 1."""
    try:
        call()
    except (ValueError, OSError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(
            f"error: {reason}"
        )
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def main() -> None:
    """Entry point of `dsv4-finetune`."""
    # PEFT and transformers warn of what is meant here, and of each other's deprecated names.
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(run(app))


if __name__ == "__main__":
    main()
