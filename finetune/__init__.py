# SPDX-License-Identifier: Apache-2.0
"""Low-rank fine-tuning of plain and quantized DSV4 models.

Importing this makes PEFT's own entry points (`get_peft_model`, `PeftModel.from_pretrained`) serve
grouped projections, routed experts, Engram memory and packed weights.
"""

from .adapters import attach_adapters, merge_adapters
from .foreign import import_adapter
from .foreign_write import export_adapter
from .full import train_weights
from .hot_experts import find_hot_experts
from .indexer_training import teach_indexer
from .memory_attach import activate_memory
from .memory_inspect import describe_memory
from .memory_rows import choose_memory_rows
from .tuner import register

__all__ = [
    "activate_memory",
    "attach_adapters",
    "choose_memory_rows",
    "describe_memory",
    "merge_adapters",
    "import_adapter",
    "export_adapter",
    "find_hot_experts",
    "teach_indexer",
    "train_weights",
]

register()
