# SPDX-License-Identifier: Apache-2.0
"""Which numbers stay float32 whatever the model is cast to.

| what | stored | computed |
|---|---|---|
| mHC fn, base, scale; hc_head | float32 | float32 |
| attention sinks, compressor position bias, router biases | float32 | float32 |
| compressor projections (ratio > 1), router weight, lm_head | model dtype | float32 |
| norms, softmax, pooling, routed sum, Engram gate, mHC mixing | - | float32 |
| everything else | model dtype | model dtype |
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Names of the float32 row of the table, as transformers' `_keep_in_fp32_modules_strict` wants them.
FLOAT32_NAMES = (
    "attn_hc",
    "ffn_hc",
    "hc_head",
    "sinks",
    "position_bias",
    "e_score_correction_bias",
    "e_score_correction_bias_vl",
)
_HALF = (torch.bfloat16, torch.float16)


def own_dtypes(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compute a model as the table says, also where autocast is on around it.

    Autocast, which trainers switch on by themselves, would round the float32 rows to bfloat16.
    """

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Both are asked: weights that lie on a disk have no device of their own.
        on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not on:
            return forward(self, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            for kind in on:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return forward(self, *args, **kwargs)

    return run


class Float32Parameters(nn.Module):
    """A module whose own float32 tensors survive `.to(bfloat16)`, `.half()` and `.bfloat16()`.

    Losing them costs 1.65 % of the logits. Children are cast as usual.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in self.children():
                child._apply(fn)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            if tensor.dtype is torch.float32 and out.dtype in _HALF and id(tensor) in strict:
                return tensor.to(out.device)
            return out

        named = (*self._parameters.items(), *self._buffers.items())
        strict = {id(t) for name, t in named if t is not None and name in self.float32_names()}
        # A parameter's `.data` and `.grad` reach `fn` as other objects than itself.
        strict |= {id(t.grad) for _, t in named if t is not None and id(t) in strict}
        return super()._apply(keep, recurse=False)

    def float32_names(self) -> tuple[str, ...]:
        """Own parameters and buffers that stay float32."""
        return FLOAT32_NAMES
