# SPDX-License-Identifier: Apache-2.0
"""The largest stream kernels compile for every GPU generation, inside its shared memory.

No GPU is needed for that, but a process in which Triton compiles instead of interpreting.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# What one program may take on the smallest of them (sm_89, sm_120).
BUDGET = 99 * 1024
TARGETS = (80, 89, 90, 100, 120)

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modeling_dsv4.kernels import close_open, expand, hyper, hyper_backward, pool, rotary

HALF = {"streams", "passed", "dy", "y", "u", "grad", "du", "dstreams", "x", "out"}
SCALARS = dict.fromkeys(("n", "D", "size", "rows", "per"), "i32") | {"eps": "fp32", "sign": "fp32"}
tiles = hyper.Tiles()
size = {"ROWS": 24, "RP": 32, "SPLIT": 4, "BF16": True}

def shared(kernel, target, warps=4, stages=3, half=(), **constants):
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = SCALARS.get(name, "*bf16" if name in HALF | {*half} else "*fp32")
        if signature[name] != "fp32":
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert made.asm["cubin"]
    return made.metadata.shared

found = {}
for target in map(int, sys.argv[1:]):
    bt, bd, *launch = tiles.project_handed
    found[f"project_handed {target}"] = shared(
        hyper.project_handed_kernel, target, *launch, half=["fn"], N=4, BT=bt, BD=bd, **size)
bt, bd, *launch = close_open.Tiles().join
for target in (80, 90, 100):
    found[f"join {target}"] = shared(
        close_open.join_kernel, target, *launch, half=["fn"],
        N=4, HANDED=True, BT=bt, BD=bd, **size)
bt, bd, *launch = tiles.spread
for target in (80, 90, 120):
    found[f"spread {target}"] = shared(
        hyper_backward.spread_kernel, target, *launch, half=["q"],
        N=4, FN=True, DW=True, BT=bt, BD=bd, **size)
bt, bd, *launch = tiles.project
found["project 90"] = shared(
    hyper.project_kernel, 90, *launch, half=["fn"], BT=bt, BD=bd, **size)
found["slopes 80"] = shared(
    hyper_backward.slopes_kernel, 80, half=["q"],
    N=4, NP=4, RP=32, ITERS=4, OWN=True, BF16=True, BT=32)
found["expand 120"] = shared(expand.expand_backward_kernel, 120, N=4, LANES=128, WIDE=8)
found["rotate 100"] = shared(rotary.rotate_backward_kernel, 100, C=512, R=64, BH=8, BC=512)
few = pool._tile(8, 512)
found["pool 90"] = shared(
    pool.pool_kernel, 90, few.pop("num_warps"), C=512, SLOTS=8, OVERLAP=True, BIASED=True, **few)
print(json.dumps(found))
"""


def test_the_largest_kernels_compile_for_every_target_within_shared_memory() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, *map(str, TARGETS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(TARGETS) + 3 + 3 + 5
    # Threads hand each other nothing.
    assert found["pool 90"] == 0
    assert {name: size for name, size in found.items() if size > BUDGET} == {}
