# SPDX-License-Identifier: Apache-2.0
"""The experts' kernels compile for every GPU from sm_80 on, and fit its shared memory.

No GPU is needed. Compiling does not go together with the interpreter, so this file runs itself as a
program in a process without it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from kernel_compiler import (
    TARGETS,
    Case,
    check,
    float32_of,
    float32_types,
    main,
    measured,
)

# FP4: one row and 16 bytes a scale.
FP4 = {"FORMAT": 1, "SCALE_ROWS": 1, "SCALE_COLUMNS": 16}


def cases() -> Iterator[Case]:
    import triton.language as tl

    from modeling_dsv4.kernels import expert_gemm, expert_gemv, experts
    from modeling_dsv4.kernels.expert_plan import MOST_ROWS

    types = {"s": "*u8"}
    few = {"TOP_K": 6, "CLAMP": True, "PIECES": 8, **experts.GEMV_TILES["gate_up"]}
    for target in (80, 100):
        yield expert_gemv.gate_up_gemv, {**FP4, **few}, target, types
    many = {"EVEN": True, "BLOCK_M": MOST_ROWS, **FP4}
    half = {"DTYPE": tl.bfloat16, "ASM": True, **many}
    first = {"TOP_K": 6, "CLAMP": True, "SAVE": True, "SPLIT_ROWS": True}
    back = {"TOP_K": 6, "HALVES": 1, "SPLIT_ROWS": False, "SCATTER": False}
    for target in TARGETS:
        yield (expert_gemm.gate_up_gemm, {**first, **half, **experts.GEMM_TILES["forward"]},
               target, types)  # fmt: skip
        yield (expert_gemm.input_grad_gemm, {**back, **half, **experts.GEMM_TILES["backward"]},
               target, types)  # fmt: skip
    wide = float32_of(experts.GEMM_TILES["forward"], ASM=False, **many)
    yield expert_gemm.gate_up_gemm, {**first, **wide}, 89, {**types, **float32_types()}


def test_every_kernel_compiles_for_every_gpu_and_fits_its_shared_memory() -> None:
    pytest.importorskip("triton")
    check(measured(__file__), 2 + 2 * len(TARGETS) + 1)


if __name__ == "__main__":
    main(cases)
