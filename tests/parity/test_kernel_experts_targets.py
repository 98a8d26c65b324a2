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
# Inputs as numbers, and as E4M3 codes with a scale for 128 columns, that is 64 bytes.
NUMBERS = {"SPAN": 0, "NARROW": False}
CODES = {"SPAN": 64, "NARROW": True}


def cases() -> Iterator[Case]:
    import triton.language as tl

    from modeling_dsv4.kernels import expert_gemm, expert_gemv, experts, rounding
    from modeling_dsv4.kernels.expert_plan import MOST_ROWS

    types, codes = {"s": "*u8", "xs": "*bf16"}, {"s": "*u8", "x": "*u8", "xs": "*u8"}
    few = {"TOP_K": 6, "CLAMP": True, "PIECES": 8, **experts.GEMV_TILES["gate_up"]}
    for target, form, kinds in ((80, NUMBERS, types), (100, NUMBERS, types), (80, CODES, codes)):
        yield expert_gemv.gate_up_gemv, {**FP4, **few, **form}, target, kinds
    for numbers, target in ((False, 80), (False, 120), (True, 90)):
        fixed = {"PIECES_IN": 2, "PIECES_OUT": 2, "SIZE": 128, "BLOCK": rounding.BLOCK}
        kinds = {"y": "*bf16"} if numbers else {"y": "*u8", "s": "*u8"}
        yield rounding.round_rows, {**fixed, "CODES": not numbers}, target, kinds
    many = {"EVEN": True, "BLOCK_M": MOST_ROWS, **FP4}
    half = {"DTYPE": tl.bfloat16, "ASM": True, **many}
    first = {"TOP_K": 6, "CLAMP": True, "SAVE": True, "SPLIT_ROWS": True}
    back = {"TOP_K": 6, "HALVES": 1, "SPLIT_ROWS": False, "SCATTER": False}
    for target in TARGETS:
        for form, kinds in ((NUMBERS, types), (CODES, codes)):
            fixed = {**first, **half, **form, **experts.GEMM_TILES["forward"]}
            yield expert_gemm.gate_up_gemm, fixed, target, kinds
        yield (expert_gemm.input_grad_gemm, {**back, **half, **experts.GEMM_TILES["backward"]},
               target, types)  # fmt: skip
    wide = float32_of(experts.GEMM_TILES["forward"], ASM=False, **many)
    for form, kinds in ((NUMBERS, types), (CODES, codes)):
        fixed = {**first, **wide, **form}
        yield expert_gemm.gate_up_gemm, fixed, 89, {**float32_types(), "xs": "*fp32", **kinds}


def test_every_kernel_compiles_for_every_gpu_and_fits_its_shared_memory() -> None:
    pytest.importorskip("triton")
    check(measured(__file__), 6 + 3 * len(TARGETS) + 2)


if __name__ == "__main__":
    main(cases)
