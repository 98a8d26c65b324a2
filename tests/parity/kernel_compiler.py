# SPDX-License-Identifier: Apache-2.0
"""Compile experts' kernels without a GPU, in a process that does not interpret them.

A test file that runs itself as a program hands `main` its cases there; under pytest `measured`
starts that program and reads what came of it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

TARGETS = (80, 89, 90, 100, 120)
# What a block may take on sm_89 and sm_120.
SHARED = 99 << 10
_INTEGERS = {"order": "*i64", "index": "*i64", "tiles": "*i32", "w": "*u8"}
_FLOATS = {"weight": "*fp32", "limit": "fp32", "across": "*fp32"}
_ACTIVATIONS = ("x", "u", "h", "y", "dy", "dx")

# A kernel, what it is compiled for (warps and stages among it), the compute capability, and the
# types of pointers that differ from those above.
Case = tuple[Any, dict[str, Any], int, dict[str, str]]


def measure(kernel: Any, fixed: dict[str, Any], target: int, types: dict[str, str]) -> Any:
    """Compile one kernel: its name, target, bytes of code and of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = dict(fixed)
    options = {"num_warps": fixed.pop("num_warps", 4), "num_stages": fixed.pop("num_stages", 3)}
    known = _INTEGERS | _FLOATS | dict.fromkeys(_ACTIVATIONS, "*bf16") | types
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name], constants[(i,)] = "constexpr", fixed[name]
        else:
            signature[name] = known.get(name, "i32")
            if signature[name] != "fp32":
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {
        "kernel": kernel.__name__,
        "target": target,
        "bytes": len(made.asm["cubin"]),
        "shared": made.metadata.shared,
    }


class OnGpu:
    """As much of float32 activations on a GPU as the choice of a tile looks at."""

    is_cuda = True

    @property
    def dtype(self) -> Any:
        import torch

        return torch.float32


def float32_of(tile: dict[str, int], **more: Any) -> dict[str, Any]:
    """What a forward kernel is compiled for where activations are float32, beside its format."""
    import triton.language as tl

    from modeling_dsv4.kernels.expert_passes import tile_for

    return {"DTYPE": tl.float32, **tile_for(tile, OnGpu()), **more}


def float32_types() -> dict[str, str]:
    """Pointer types of float32 activations."""
    return dict.fromkeys(_ACTIVATIONS, "*fp32")


def main(cases: Callable[[], Iterable[Case]]) -> None:
    """Compile all and print what came of it."""
    sys.stdout.write(json.dumps([measure(*case) for case in cases()]) + "\n")


def measured(program: str) -> list[dict[str, Any]]:
    """What `main` of a file printed, in a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: list[dict[str, Any]], count: int) -> None:
    """Every case gave code, and fits the shared memory of the smallest target."""
    assert len(found) == count
    assert all(made["bytes"] > 0 for made in found)
    assert [made for made in found if made["shared"] > SHARED] == []
