# SPDX-License-Identifier: Apache-2.0
"""The kernels of whole numbers and trellises compile for every GPU from sm_80 on, and fit it.

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
# The widest word arithmetic of either kind: codes across words, and windows of three codes.
INT3 = {"BITS": 3, "GROUP": 64, "TRELLIS": False}
TRELLIS2 = {"BITS": 4, "GROUP": 4096, "TRELLIS": True}


def compile_for(kernel: Any, fixed: dict[str, Any], target: int) -> Any:
    """One kernel's code; `fixed` holds its constants, warps and stages."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = dict(fixed)
    options = {"num_warps": fixed.pop("num_warps", 4), "num_stages": fixed.pop("num_stages", 3)}
    table = "*i32" if fixed.get("TRELLIS") else "*u8"
    pointers = {"order": "*i64", "index": "*i64", "tiles": "*i32", "weight": "*fp32",
                "w": "*u8", "s": "*i16", "z": table, "limit": "fp32",
                "across": "*fp32"}  # fmt: skip
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
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _compile_all() -> list[dict[str, Any]]:
    import triton.language as tl

    from modeling_dsv4.kernels.experts import MOST_ROWS
    from quantize.kernels import experts, gemm, gemv, rotate

    number = {"DTYPE": tl.bfloat16, "EVEN": True, "BLOCK_M": MOST_ROWS}
    few = {"TOP_K": 6, "CLAMP": True, "PIECES": 32}
    gate_up = {"TOP_K": 6, "CLAMP": True, "SAVE": True, **number}
    back = {"TOP_K": 6, "SCATTER": False, **number}
    order = {"PIECES_IN": 1, "PIECES_OUT": 2, "BLOCK_A": 16, "B": 256, "STEPS": 8}
    cases = [
        (gemv.gate_up_gemv, few, INT3, (80,)),
        (gemv.gate_up_gemv, few, TRELLIS2, (100,)),
        (gemm.gate_up_gemm, gate_up, INT3, (90,)),
        # Two tiles of inputs and of weights: what takes most shared memory.
        (gemm.gate_up_gemm, gate_up, TRELLIS2, TARGETS),
        (gemm.input_grad_gemm, back, INT3, (120,)),
        (gemm.input_grad_gemm, back, TRELLIS2, (90,)),
    ]
    found = [_measure(rotate.rotate_rows, order, target) for target in (80, 100)]
    for kernel, fixed, form, targets in cases:
        kind = "trellis" if form["TRELLIS"] else "grid"
        if kernel is gemv.gate_up_gemv:
            tile = experts.GEMV_TILES[kind]
        else:
            way = "backward" if kernel is gemm.input_grad_gemm else "forward"
            tile = experts.GEMM_TILES[f"{kind} {way}"]
        found += [_measure(kernel, {**form, **fixed, **tile}, target) for target in targets]
    return found


def _measure(kernel: Any, fixed: dict[str, Any], target: int) -> dict[str, Any]:
    made = compile_for(kernel, fixed, target)
    return {
        "kernel": kernel.__name__,
        "target": target,
        "bytes": len(made.asm["cubin"]),
        "shared": made.metadata.shared,
    }


def test_every_kernel_compiles_for_every_gpu_and_fits_its_shared_memory() -> None:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 7 + len(TARGETS)
    assert all(made["bytes"] > 0 for made in found)
    assert [made for made in found if made["shared"] > SHARED] == []


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_compile_all()) + "\n")
