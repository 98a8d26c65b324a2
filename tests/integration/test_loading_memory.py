# SPDX-License-Identifier: Apache-2.0
"""Loading holds the weights once: a process of its own, so that its peak is its own too."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A small model first: what is imported and allocated once does not count.
PROGRAM = """
import resource, sys
import torch
from modeling_dsv4 import Dsv4ForCausalLM

torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
Dsv4ForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
before = peak()
model = Dsv4ForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
grown = peak() - before
print(sum(t.nbytes for t in model.state_dict().values()), grown)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("where", ["tests/golden/v4_native_nano", "models/nano-v41"])
def test_loading_holds_the_weights_once_and_the_file_as_pages(where: str) -> None:
    small = ROOT / "tests/golden/v4_a_fp8"
    command = [sys.executable, "-c", PROGRAM, str(small), str(ROOT / where)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    weights, grown = map(int, out.split())
    file = sum(shard.stat().st_size for shard in (ROOT / where).glob("model*.safetensors"))
    # 10 MiB for tensors on their way and the allocator; a second copy takes 16 in bfloat16.
    assert weights > 30 << 20
    assert grown < weights + file + (10 << 20)
