# SPDX-License-Identifier: Apache-2.0
"""Low-rank fine-tuning of plain and quantized DSV4 models.

Importing this makes PEFT's own entry points (`get_peft_model`, `PeftModel.from_pretrained`) serve
grouped projections, routed experts and packed weights.
"""

from .adapters import attach_adapters, merge_adapters
from .foreign import import_adapter
from .foreign_write import export_adapter
from .full import train_weights
from .hot_experts import find_hot_experts
from .indexer_training import teach_indexer
from .tuner import register

__all__ = [
    "attach_adapters",
    "merge_adapters",
    "import_adapter",
    "export_adapter",
    "find_hot_experts",
    "teach_indexer",
    "train_weights",
]

register()
