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
# Where numbers are compiled as well: the least of everything, the most, and warp groups.
SOME = (80, 90, 120)


def cases() -> Iterator[Case]:
    import triton.language as tl

    from modeling_dsv4.kernels import expert_gemm, expert_gemv, experts, rounding
    from modeling_dsv4.kernels.expert_plan import MOST_ROWS

    types, codes = {"s": "*u8", "xs": "*bf16"}, {"s": "*u8", "x": "*u8", "xs": "*u8"}
    few = {"TOP_K": 6, "CLAMP": True, "PIECES": 8, **experts.GEMV_TILES["gate_up"]}
    for target, form, kinds in ((80, NUMBERS, types), (100, CODES, codes)):
        yield expert_gemv.gate_up_gemv, {**FP4, **few, **form}, target, kinds
    fixed = {"PIECES_IN": 2, "PIECES_OUT": 2, "SIZE": 128, "BLOCK": rounding.BLOCK}
    for target in (80, 120):
        yield rounding.round_rows, {**fixed, "CODES": True}, target, {"y": "*u8", "s": "*u8"}
    many = {"EVEN": True, "BLOCK_M": MOST_ROWS, **FP4}
    half = {"DTYPE": tl.bfloat16, "ASM": True, **many}
    first = {"TOP_K": 6, "CLAMP": True, "SAVE": True, "SPLIT_ROWS": True}
    back = {"TOP_K": 6, "HALVES": 1, "SPLIT_ROWS": False, "SCATTER": False}
    for target in TARGETS:
        fixed = {**first, **half, **experts.GEMM_TILES["forward"]}
        yield expert_gemm.gate_up_gemm, {**fixed, **CODES}, target, codes
        if target in SOME:
            yield expert_gemm.gate_up_gemm, {**fixed, **NUMBERS}, target, types
        yield (expert_gemm.input_grad_gemm, {**back, **half, **experts.GEMM_TILES["backward"]},
               target, types)  # fmt: skip
    wide = float32_of(experts.GEMM_TILES["forward"], ASM=False, **many)
    kinds = {**types, **float32_types(), "xs": "*fp32"}
    yield expert_gemm.gate_up_gemm, {**first, **wide, **NUMBERS}, 89, kinds


def test_every_kernel_compiles_for_every_gpu_and_fits_its_shared_memory() -> None:
    pytest.importorskip("triton")
    check(measured(__file__), 4 + 2 * len(TARGETS) + len(SOME) + 1)


if __name__ == "__main__":
    main(cases)
