# SPDX-License-Identifier: Apache-2.0
"""The experts' kernels compile for every GPU from sm_80 on, and fit its shared memory.

No GPU is needed. Compiling does not go together with the interpreter, so this file runs itself as a
program in a process without it.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

TARGETS = (80, 89, 90, 100, 120)
# What a block may take on sm_89 and sm_120.
SHARED = 99 << 10
# FP4: one row and 16 bytes a scale.
FP4 = {"FORMAT": 1, "SCALE_ROWS": 1, "SCALE_COLUMNS": 16}


def _compile(kernel: Any, fixed: dict[str, Any], target: int, warps: int, stages: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"order": "*i64", "index": "*i64", "tiles": "*i32", "weight": "*fp32",
                "w": "*u8", "s": "*u8", "limit": "fp32"}  # fmt: skip
    pointers |= dict.fromkeys(("x", "u", "h", "y", "dy", "dx"), "*bf16")
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name], constants[(i,)] = "constexpr", fixed[name]
        else:
            signature[name] = pointers.get(name, "i32")
            if name != "limit":
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _compile_all() -> list[dict[str, Any]]:
    import triton.language as tl

    from modeling_dsv4.kernels import expert_gemm, expert_gemv, experts

    number = {"DTYPE": tl.bfloat16, "ASM": True, "EVEN": True, "BLOCK_M": experts.MOST_ROWS}
    cases: list[tuple[Any, dict[str, Any], tuple[int, ...]]] = [
        (expert_gemv.gate_up_gemv, {"TOP_K": 6, "CLAMP": True, "PIECES": 8,
         **experts.GEMV_TILES["gate_up"]},
         (80, 100)),
        (expert_gemm.gate_up_gemm, {"TOP_K": 6, "CLAMP": True, "SAVE": True, "SPLIT_ROWS": True,
         **number, **experts.GEMM_TILES["forward"]}, TARGETS),
        (expert_gemm.input_grad_gemm, {"TOP_K": 6, "HALVES": 1, "SPLIT_ROWS": False,
         "SCATTER": False, **number, **experts.GEMM_TILES["backward"]}, TARGETS),
    ]  # fmt: skip
    found = []
    for kernel, fixed, targets in cases:
        warps, stages = fixed.pop("num_warps", 4), fixed.pop("num_stages", 3)
        for target in targets:
            made = _compile(kernel, {**FP4, **fixed}, target, warps, stages)
            found.append({
                "kernel": kernel.__name__,
                "target": target,
                "bytes": len(made.asm["cubin"]),
                "shared": made.metadata.shared,
            })  # fmt: skip
    return found


def test_every_kernel_compiles_for_every_gpu_and_fits_its_shared_memory() -> None:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 + 2 * len(TARGETS)
    assert all(made["bytes"] > 0 for made in found)
    assert [made for made in found if made["shared"] > SHARED] == []


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_compile_all()) + "\n")
