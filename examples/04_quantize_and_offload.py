# SPDX-License-Identifier: Apache-2.0
"""Pack the routed experts in FP4, leave them on disk, and read only those that are routed to.

    python examples/04_quantize_and_offload.py

`quantize.convert` is what `dsv4-quantize convert` calls. Where the experts are, in memory or on
disk, changes no bit of a result.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_dsv4 import Dsv4ForCausalLM
from quantize import get_recipe
from quantize.convert import convert

DIRECTORY = Path(__file__).parents[1] / "tests" / "golden" / "v4_b_bf16_mtp"


@torch.no_grad()
def main() -> None:
    input_ids = load_file(DIRECTORY / "inputs.safetensors")["input_ids"][:, :40]
    with tempfile.TemporaryDirectory() as folder:
        packed = convert(DIRECTORY, Path(folder, "fp4"), get_recipe("fp4"))
        resident = Dsv4ForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
        on_disk = Dsv4ForCausalLM.from_pretrained(
            packed, dtype=torch.float32, expert_memory="64KiB"
        ).eval()
        first, second = resident(input_ids).logits, on_disk(input_ids).logits
        # The draft head's experts stay on disk in both: plain decoding does not use them.
        for name, model in (("resident", resident), ("on disk", on_disk)):
            print(f"bytes of experts, {name}: {model.memory_report()['experts']}")
        counts = on_disk.stats()
        print(f"read from disk for {input_ids.shape[1]} tokens: {counts['bytes_read']:,} bytes, "
              f"{counts['misses']} experts")  # fmt: skip
    print(f"logits that the disk changed: {int((first != second).sum())}")


if __name__ == "__main__":
    main()
