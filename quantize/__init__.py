# SPDX-License-Identifier: Apache-2.0
"""Quantized storage, experts on disk and placement for DSV4 models.

Importing it makes `from_pretrained` load converted models.
"""

from . import bnb_formats as bnb_formats
from . import bnb_quantizer
from .bnb_quantizer import Dsv4BitsAndBytesConfig
from .config import RECIPES, Dsv4QuantizationConfig, Recipe, get_recipe
from .grids import INT2, INT3, INT4
from .hf_quantizer import Dsv4Quantizer, register

register()
bnb_quantizer.register()

__all__ = [
    "INT2",
    "INT3",
    "INT4",
    "RECIPES",
    "Dsv4BitsAndBytesConfig",
    "Dsv4QuantizationConfig",
    "Dsv4Quantizer",
    "Recipe",
    "get_recipe",
]
