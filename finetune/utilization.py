# SPDX-License-Identifier: Apache-2.0
"""How much of a machine's arithmetic a training step uses.

Operations of a step are counted while it runs (products of matrices, forward and backward, by
torch's own formulas), not derived from a configuration. What they are compared with is measured on
the same device: the best of a few products of large matrices in the weights' dtype. Kernels that
torch does not know (Triton, C) are not counted.
"""

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Long enough for clocks to rise, short enough for every start of a run.
_SIZE, _TIMES = 1024, 8


def processor_seconds() -> float:
    """A clock for work on a device: other processes' time does not count on a CPU.

    Seconds of this process on all processors over torch's threads; wall time with an accelerator.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


@torch.no_grad()
def matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a large product of matrices; a multiplication and an addition are two.

    Best of a few, so that a busy machine tells what it could do.
    """
    a, b = (torch.randn(_SIZE, _SIZE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_TIMES):
        start = processor_seconds()
        torch.mm(a, b)
        best = min(best, processor_seconds() - start)
    return 2 * _SIZE**3 / max(best, 1e-9)


class CountOperations(TorchDispatchMode):
    """Counts what runs inside the block; FlopCounterMode without its hooks on modules.

    Those want every tensor that needs a gradient to have come from an operation with one, which is
    not so where a module is run without gradients.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
