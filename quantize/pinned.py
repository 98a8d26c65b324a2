# SPDX-License-Identifier: Apache-2.0
"""Host memory in whole pages, and pinned for copies to a GPU that nobody waits for."""

import contextlib
import logging
import mmap
import os
import sys
import weakref

import torch

_LOG = logging.getLogger(__name__)


def page_aligned(size: int) -> torch.Tensor:
    """Memory [size] uint8 in pages of its own, which are only taken when they are written."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def pinned(size: int) -> torch.Tensor:
    """As `page_aligned`, and locked into memory as long as the tensor lives.

    Where the system refuses (WSL2 and limits of locked memory do), the memory is ordinary: a copy
    from it is slower, and right.
    """
    buffer = page_aligned(size)
    runtime, start = torch.cuda.cudart(), buffer.data_ptr()
    if int(runtime.cudaHostRegister(start, size, 0)):
        _forget_error()
        _LOG.info("%d bytes of host memory could not be pinned", size)
        return buffer
    # A view may keep the memory longer: it is then ordinary, and still there.
    weakref.finalize(buffer, _unpin, start, os.getpid())
    return buffer


def _forget_error() -> None:
    """Take the runtime's last error away, which the next launch would report as its own.

    Nothing in torch reads it but the check behind a launch, which forgets it as it raises.
    """
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(1)


def _unpin(start: int, owner: int) -> None:
    # A forked process has the memory, but neither the runtime nor the lock.
    if os.getpid() == owner and not sys.is_finalizing():
        torch.cuda.cudart().cudaHostUnregister(start)
