# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in foreign layouts: recognised, checked against the configuration, loaded.

| layout | names | experts |
|---|---|---|
| dsv4 | ours | stacked |
| official | the release's | one tensor each |
| transformers_hybrid | what transformers' `deepseek_v4` saves by default | one tensor each |
| transformers_fused | those of its modules | stacked |

Storage formats pass through as they are: FP4 stays packed and FP8 stays FP8 unless `dequantize` is
asked for. Writing the official layout back is in `official_export`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from . import formats
from .configuration_dsv4 import Dsv4Config
from .official_export import save_official
from .safetensors_file import DTYPES, Shards, TensorInfo, read_header, read_index
from .translate_config import is_foreign_config
from .weight_map import (
    TOKEN_MAP,
    Inventory,
    Piece,
    fused_to_ours,
    hybrid_to_official,
    our_inventory,
    pieces,
    release_storage,
)

_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
_BESIDE_BACKBONE = re.compile(r"(lm_head|head|mtp|vision|aligner|image_\w+)(\.|$)")


_RENAME: dict[str, Callable[[str], str]] = {
    "official": str,
    "transformers_hybrid": hybrid_to_official,
    "transformers_fused": fused_to_ours,
}


def detect_layout(directory: str | Path) -> str:
    """Return "dsv4", "official", "transformers_hybrid" or "transformers_fused".

    Raises:
        ValueError: for a directory without weights, or with another model's.
    """
    return layout_of(directory, list(read_index(directory)))


def layout_of(directory: str | Path, names: list[str]) -> str:
    """Like `detect_layout` for a directory whose tensors' names are known."""
    if any(re.match(r"(model\.)?layers\.\d+\.self_attn\.", name) for name in names):
        config = Path(directory) / "config.json"
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        native = any(".compressor.indexer." in name for name in names)
        return "transformers_fused" if native or is_foreign_config(fields) else "dsv4"
    if any(re.match(r"(model\.)?layers\.\d+\.(attn|ffn)\.", name) for name in names):
        mixed = any(name.startswith("model.") or ".attn.norm." in name for name in names)
        return "transformers_hybrid" if mixed else "official"
    raise ValueError(
        f"{directory}: wanted the tensors of a DeepSeek-V4 or V4.1 model, got {sorted(names)[:3]}"
    )


def count_draft_layers(names: Iterable[str]) -> int:
    """Count the draft stages among tensor names; a configuration's own count is not reliable."""
    stages = {int(match[1]) for name in names if (match := re.match(r"mtp\.(\d+)\.", name))}
    if stages != set(range(len(stages))):
        raise ValueError(f"wanted draft stages 0, 1, ... without gaps, got {sorted(stages)}")
    return len(stages)


def fit_config(config: Dsv4Config, names: Iterable[str]) -> None:
    """Say in the configuration what the weights hold beside the backbone: drafts, vision."""
    names = list(names)
    config.set_draft_layers(count_draft_layers(names))
    config.carries_vision = any(name.startswith("vision.") for name in names)


def load_foreign(
    directory: str | Path,
    config: Dsv4Config,
    dequantize: bool = False,
    dtype: torch.dtype | None = None,
    backbone: bool = False,
) -> dict[str, torch.Tensor]:
    """Load a directory in a foreign layout as a state dict with our names.

    Args:
        directory: official layout or either of transformers'.
        config: its configuration, as `fit_config` left it.
        dequantize: expand FP4 and FP8 to plain tensors. Exact in bfloat16 and wider.
        dtype: of the expanded tensors; bfloat16 by default.
        backbone: only the tensors of `model.*`; others may be there or not.

    Returns:
        Tensors mapped from the files where none is stacked, copies otherwise; float32 where the
        release computes in float32. Deterministic order.

    Raises:
        ValueError: missing, extra or misshapen tensors; broken files.
    """
    shards = Shards(directory)
    layout = detect_layout(directory)
    if layout not in _RENAME:
        raise ValueError(f"{directory} is in our own layout: from_pretrained loads it directly")
    rename = _RENAME[layout]
    stored = {rename(name): name for name in shards.info}
    fused = layout == "transformers_fused"
    if len(stored) != len(shards.info):
        raise ValueError(f"{directory}: it holds the same tensor under two names")
    wanted = _fused_inventory(config) if fused else {p.official: p for p in pieces(config)}
    info = {renamed: shards.info[name] for renamed, name in stored.items()}
    if backbone:
        wanted = {name: p for name, p in wanted.items() if p.ours.startswith("model.")}
        info = {name: i for name, i in info.items() if not _BESIDE_BACKBONE.match(name)}
    _compare(shards.directory, {n: (p.dtype, p.shape) for n, p in wanted.items()}, info)
    reader = _Reader(shards, stored, config, dequantize, dtype or torch.bfloat16)
    return reader.state_dict(wanted)


def check_own(directory: str | Path, expected: Inventory) -> None:
    """Check a directory in our own layout against what the model wants.

    Args:
        directory: with `model.safetensors` or an index.
        expected: {our name: (safetensors dtype, shape)}, as `our_inventory` gives it.

    Raises:
        ValueError: missing, extra or misshapen tensors, another kind of dtype; broken files.
    """
    shards = Shards(directory)
    _compare(shards.directory, expected, shards.info)


def _fused_inventory(config: Dsv4Config) -> dict[str, Piece]:
    kinds = {piece.ours: piece.kind for piece in pieces(config)}
    return {
        name: Piece(name, name, dtype, shape, kinds[name], False, None, 0, 1)
        for name, (dtype, shape) in our_inventory(config).items()
        if name != TOKEN_MAP
    }


def _compare(directory: Path, expected: Inventory, found: Mapping[str, TensorInfo]) -> None:
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name}: wanted {dtype} {list(shape)}, got {found[name].dtype} {list(found[name].shape)}"
        for name, (dtype, shape) in expected.items()
        if name in found and not _fits(found[name], dtype, shape)
    ]
    lists = {"missing": missing, "not expected": extra, "of another shape or dtype": wrong}
    parts = [f"{len(names)} {what} ({_some(names)})" for what, names in lists.items() if names]
    if parts:
        raise ValueError(
            f"{directory}: its tensors do not fit its config.json: {'; '.join(parts)}. "
            "Complete the download, or use the config.json that belongs to these weights."
        )


def _fits(info: TensorInfo, dtype: str, shape: tuple[int, ...]) -> bool:
    # A plain tensor may have been saved in another float type; a code or a scale may not.
    same = info.dtype == dtype or {info.dtype, dtype} <= _FLOATS
    return same and info.shape == tuple(shape)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class _Reader:
    """Puts the pieces of a checkpoint together under our names."""

    def __init__(
        self,
        shards: Shards,
        stored: Mapping[str, str],
        config: Dsv4Config,
        dequantize: bool,
        dtype: torch.dtype,
    ) -> None:
        self.shards = shards
        self.stored = stored
        self.block = release_storage(config).block
        self.dequantize = dequantize
        self.dtype = dtype

    def state_dict(self, wanted: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
        experts: dict[str, int] = {}
        for piece in wanted.values():
            if piece.expert is not None:
                experts[piece.ours] = piece.expert + 1
        state: dict[str, torch.Tensor] = {}
        for official, piece in wanted.items():
            if piece.is_scale and self.dequantize:
                continue
            if piece.expert is None:
                state[piece.ours] = self._whole(official, piece)
            else:
                self._stack(state, official, piece, experts[piece.ours])
        return state

    def _whole(self, official: str, piece: Piece) -> torch.Tensor:
        tensor = self._expanded(official, piece)
        return tensor.float() if piece.kind == "f32" else tensor

    def _stack(
        self, state: dict[str, torch.Tensor], official: str, piece: Piece, experts: int
    ) -> None:
        name = self.stored[official]
        as_stored = piece.kind == "bf16" or not self.dequantize
        # Packed FP4 is I8 in a release and U8 here: codes are no numbers.
        stored = torch.uint8 if piece.kind == "fp4" else DTYPES[self.shards.info[name].dtype]
        if piece.is_scale:
            stored = torch.float8_e8m0fnu
        rows, columns = piece.shape
        if not as_stored and piece.kind == "fp4":
            columns *= 2
        if piece.ours not in state:
            shape = (experts, piece.parts * rows, columns)
            state[piece.ours] = torch.empty(shape, dtype=stored if as_stored else self.dtype)
        out = state[piece.ours][piece.expert, piece.part * rows : (piece.part + 1) * rows]
        if as_stored and out.dtype is stored:
            self.shards.read_into(name, out)
        else:
            out.copy_(self._expanded(official, piece))

    def _expanded(self, official: str, piece: Piece) -> torch.Tensor:
        """Return a stored tensor, expanded if it is asked for and stored in fewer bits."""
        tensor = self.shards.get(self.stored[official])
        if not self.dequantize or piece.kind not in ("fp4", "fp8", "rows"):
            return tensor
        scale = self.shards.get(self.stored[official.removesuffix("weight") + "scale"])
        if piece.kind == "fp4":
            return formats.unpack_fp4(tensor.view(torch.uint8), scale, self.dtype)
        if piece.kind == "rows":
            return formats.dequantize_fp8_rows(tensor, scale, dtype=self.dtype)
        assert self.block is not None
        return formats.dequantize_fp8_block(tensor, scale, self.block, self.dtype)


__all__ = [
    "check_own",
    "count_draft_layers",
    "detect_layout",
    "load_foreign",
    "read_header",
    "read_index",
    "save_official",
]
