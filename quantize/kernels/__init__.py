# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for packed experts; imported when the first of them is chosen."""
