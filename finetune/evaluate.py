# SPDX-License-Identifier: Apache-2.0
"""What comes after training, from files to files: evaluate an adapter, merge it."""

from pathlib import Path
from typing import Any

from .adapters import load_adapters, merge_adapters
from .config import RUN_FILE, RunConfig
from .data import Examples, encode_records
from .files import staged
from .loading import load_model, load_tokenizer
from .losses import held_out_loss
from .records import read_records
from .run_data import build_held_out


def evaluate_files(
    model: str | Path,
    data: str | Path,
    *,
    adapter: str | Path | None = None,
    max_length: int = 2048,
    expert_memory: str | None = None,
    held_out: bool = False,
) -> dict[str, Any]:
    """Mean loss per answer token of a jsonl file, base and adapter side by side.

    Args:
        model: base model.
        data: jsonl file.
        adapter: directory of an adapter; without it only the base is measured.
        max_length: tokens per example.
        expert_memory: how much of the experts may be resident.
        held_out: only the records that the adapter's run held out of this file, cut and masked
            as it did.
    """
    tokenizer = load_tokenizer(model)
    if held_out:
        run = Path(adapter or "", RUN_FILE)
        if adapter is None or not run.is_file():
            raise ValueError(f"held-out records: wanted an adapter with its {RUN_FILE}, got none")
        examples, report = build_held_out(RunConfig.from_yaml(run), data, tokenizer)
    else:
        examples, report = encode_records(read_records(data), tokenizer, max_length)
    rows = Examples(examples)
    network = load_model(model, expert_memory=expert_memory)
    before, after = None, None
    if adapter is None:
        before = held_out_loss(network, rows, tokenizer)
    else:
        tuned = load_adapters(network, adapter)
        after = held_out_loss(tuned, rows, tokenizer)
        with tuned.disable_adapter():
            before = held_out_loss(tuned, rows, tokenizer)
    return {"loss_before": before, "loss_after": after, **report.to_dict()}


def merge_files(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dequantize: bool = False,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Merge an adapter into its base and save the model with its tokenizer.

    Raises:
        ValueError: the base is packed and `dequantize` was not asked for, the adapter is another
            model's, or the output exists.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: wanted an empty or new directory, got {output} with files")
    network = load_model(model, dtype=dtype, dequantize=dequantize)
    merged = merge_adapters(load_adapters(network, adapter))
    tokenizer = load_tokenizer(model)
    with staged(output) as folder:
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return {
        "output": str(output),
        "adapter": str(adapter),
        "dtype": str(merged.dtype).removeprefix("torch."),
        "parameters": merged.num_parameters(),
    }
