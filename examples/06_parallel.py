# SPDX-License-Identifier: Apache-2.0
"""Split a model over two processes: each holds half of the experts.

    python examples/06_parallel.py

starts itself once more as `torchrun --nproc_per_node 2 examples/06_parallel.py` would, on the CPU
with gloo. With GPUs the same lines take one GPU for each process, and nccl.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers.distributed import DistributedConfig

from modeling_dsv4 import Dsv4ForCausalLM

DIRECTORY = Path(__file__).parents[1] / "models" / "nano-v41"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]


@torch.no_grad()
def main() -> None:
    count = int(os.environ["WORLD_SIZE"])
    # Experts by number, everything else that can be split by width.
    config = DistributedConfig(tp_size=count, ep_size=count)
    options = {"dtype": torch.float32}
    split = Dsv4ForCausalLM.from_pretrained(DIRECTORY, distributed_config=config, **options)
    input_ids = torch.arange(3, 103)[None]
    logits = split(input_ids).logits
    # Every process computes the same and has the same result; one of them compares and prints.
    if torch.distributed.get_rank() == 0:
        whole = Dsv4ForCausalLM.from_pretrained(DIRECTORY, **options)
        error = (logits - whole(input_ids).logits).abs().max().item()
        for name, model in (("one process", whole), (f"each of {count} processes", split)):
            held = model.memory_report()["experts"]
            print(f"bytes of experts in {name}: {sum(held.values()):,}")
        print(f"largest difference between {count} processes and one: {error:.1e}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        main()
    else:
        sys.exit(subprocess.run([sys.executable, *TORCHRUN, __file__]).returncode)
