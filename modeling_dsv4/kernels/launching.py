# SPDX-License-Identifier: Apache-2.0
"""Where a kernel is launched: Triton takes the current device, whatever its tensors are on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Inside the block kernels are launched on x's device; nothing changes for one on a CPU.

    A compiler launches its kernels where its tensors are, and traces no change of the device.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)
