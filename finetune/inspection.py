# SPDX-License-Identifier: Apache-2.0
"""What an adapter's files say, without loading a model: `inspect_adapter`."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open

from .deltas import check_weights, read_config
from .foreign_read import scale_of
from .hot_experts import HotExperts
from .layouts import common_name, split_name
from .targets import ATTENTION, EXPERTS, INDEXER, PRESETS, SHARED, target_regex
from .tuner import IDENTITY_KEY

GROUPS = {
    "attention": ATTENTION,
    "shared experts": SHARED,
    "routed experts": EXPERTS + r"(?:\..*)?",
    "indexer": INDEXER,
    "memory": r".*\bengram\b.*",
}


def inspect_adapter(directory: str | Path) -> dict[str, Any]:
    """Describe an adapter, ours or another tool's.

    Returns:
        plain values: `preset` (None where none means just this), `targets`, `base` (`identity`,
        `path`), `parameters`, `bytes` of the tensors' file, `groups` (by name: `modules`,
        `layers`, `tensors`, `parameters`, `ranks`, `scales`), and `hot_experts` (`share`, `score`,
        `tokens`, and by layer `ids` and `mass`) or None.

    Raises:
        ValueError: no adapter there.
    """
    folder = Path(directory)
    values, weights = read_config(folder), check_weights(folder)
    config = LoraConfig.from_pretrained(str(folder))
    groups = _groups(config, _shapes(weights))
    hot = HotExperts.of(config)
    return {
        "adapter": str(folder),
        "preset": _preset(config, hot),
        "targets": values.get("target_modules"),
        "base": {
            "identity": (config.auto_mapping or {}).get(IDENTITY_KEY),
            "path": config.base_model_name_or_path,
        },
        "parameters": sum(group["parameters"] for group in groups.values()),
        "bytes": weights.stat().st_size,
        "groups": groups,
        "hot_experts": None if hot is None else hot.to_dict(),
    }


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        # Not a dict, and only headers are read.
        return {
            name: tuple(tensors.get_slice(name).get_shape())
            for name in tensors.keys()  # noqa: SIM118
        }


def _groups(config: LoraConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sums by group; groups without tensors are left out."""
    found: dict[str, dict[str, Any]] = defaultdict(
        lambda: (
            {"modules": set(), "layers": set(), "tensors": 0, "parameters": 0}
            | {"ranks": set(), "scales": set()}
        )
    )
    for name, shape in shapes.items():
        names = split_name(name)
        module = common_name(names.module if names else name.removeprefix("base_model.model."))
        group = found[_group_of(module)]
        size = 1
        for axis in shape:
            size *= axis
        group["tensors"] += 1
        group["parameters"] += size
        group["modules"].add(module)
        layer = re.match(r"layers\.(\d+)\.", module)
        if layer is not None:
            group["layers"].add(int(layer[1]))
        if names is not None and names.side == "B":
            group["ranks"].add(shape[-1])
            group["scales"].add(scale_of(config, names.module))
    order = [*GROUPS, "other"]
    return {
        name: {key: _plain(value, key) for key, value in found[name].items()}
        for name in order
        if name in found
    }


def _group_of(module: str) -> str:
    for name, pattern in GROUPS.items():
        if re.fullmatch(pattern, module):
            return name
    return "other"


def _plain(value: Any, key: str) -> Any:
    if not isinstance(value, set):
        return value
    return len(value) if key == "modules" else sorted(value)


def _preset(config: LoraConfig, hot: HotExperts | None) -> str | None:
    """The preset that puts adapters on the same modules."""
    targets = config.target_modules
    plain = targets.removesuffix(f"|{INDEXER}") if isinstance(targets, str) else None
    for name, preset in PRESETS.items():
        same = preset.patterns and plain == target_regex(name)
        if same and preset.hot <= (hot is not None):
            return name
    return None
