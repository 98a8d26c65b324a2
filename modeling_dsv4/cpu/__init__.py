# SPDX-License-Identifier: Apache-2.0
"""Operations of a decoding step in C, for CPUs: few tokens, no gradients."""
