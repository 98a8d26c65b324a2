# SPDX-License-Identifier: Apache-2.0
"""The kernels of whole numbers and trellises compile for every GPU from sm_80 on, and fit it.

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

# The widest word arithmetic of either kind: codes across words, and windows of three codes.
INT3 = {"BITS": 3, "GROUP": 64, "TRELLIS": False}
TRELLIS2 = {"BITS": 4, "GROUP": 4096, "TRELLIS": True}
TYPES = {
    "grid": {"s": "*i16", "z": "*u8", "x": "*u8", "xs": "*u8"},
    "trellis": {"s": "*i16", "z": "*i32", "xs": "*bf16"},
}
# Whole numbers meet codes of inputs here, which take more arithmetic; a trellis' are numbers.
INPUTS = {"grid": {"SPAN": 128, "NARROW": True}, "trellis": {"SPAN": 0, "NARROW": False}}


def cases() -> Iterator[Case]:
    import triton.language as tl

    from modeling_dsv4.kernels.expert_plan import MOST_ROWS
    from quantize.kernels import experts, gemm, gemv, rotate

    order = {"PIECES_IN": 1, "PIECES_OUT": 2, "BLOCK_A": 16, "B": 256, "STEPS": 8}
    for target in (80, 100):
        yield rotate.rotate_rows, order, target, {}
    few = {"TOP_K": 6, "CLAMP": True, "PIECES": 32}
    for kind, form, target in (("grid", INT3, 80), ("trellis", TRELLIS2, 100)):
        tile = experts.GEMV_TILES[kind]
        yield gemv.gate_up_gemv, {**form, **few, **tile, **INPUTS[kind]}, target, TYPES[kind]
    tiles, many = experts.GEMM_TILES, {"EVEN": True, "BLOCK_M": MOST_ROWS}
    half = {"DTYPE": tl.bfloat16, **many}
    first = {"TOP_K": 6, "CLAMP": True, "SAVE": True}
    back = {"TOP_K": 6, "SCATTER": False}
    # Two tiles of inputs and of weights: what takes most shared memory.
    for kind, form, targets in (("grid", INT3, (90,)), ("trellis", TRELLIS2, TARGETS)):
        fixed = {**form, **first, **half, **INPUTS[kind], **tiles[f"{kind} forward"]}
        for target in targets:
            yield gemm.gate_up_gemm, fixed, target, TYPES[kind]
    for kind, form, target in (("grid", INT3, 120), ("trellis", TRELLIS2, 90)):
        fixed = {**form, **back, **half, **tiles[f"{kind} backward"]}
        yield gemm.input_grad_gemm, fixed, target, TYPES[kind]
    wide = float32_of(tiles["trellis forward"], **many, **TRELLIS2)
    kinds = {**TYPES["trellis"], **float32_types(), "xs": "*fp32"}
    yield gemm.gate_up_gemm, {**first, **wide, **INPUTS["trellis"]}, 89, kinds


def test_every_kernel_compiles_for_every_gpu_and_fits_its_shared_memory() -> None:
    pytest.importorskip("triton")
    check(measured(__file__), 7 + len(TARGETS) + 1)


if __name__ == "__main__":
    main(cases)
