# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of training; `low_rank.py` and `chunked_loss.py` beside this folder choose."""
