# SPDX-License-Identifier: Apache-2.0
"""Triton twins of the operations; each module is imported when its first kernel is chosen."""
