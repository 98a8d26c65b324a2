# SPDX-License-Identifier: Apache-2.0
"""One module per command of `dsv4-finetune`; `finetune.cli` puts them together."""
