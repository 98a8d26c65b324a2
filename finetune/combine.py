# SPDX-License-Identifier: Apache-2.0
"""A new adapter as the weighted sum of others: `PeftModel.add_weighted_adapter` for our layers.

With `d_i = s_i B_i A_i` an adapter's update of a matrix and w_i its weight:

| kind | A and B of the new adapter | its update | its rank |
|---|---|---|---|
| `cat` | all `w_i s_i A_i` in one, all `B_i` in one | `sum w_i d_i`, exactly | the sum |
| `svd` | the nearest of their rank | near `sum w_i d_i` | the largest, or `svd_rank` |
| `linear` | sums of `sqrt(w_i s_i)` times A_i, B_i | with all `B_i A_j` in it | that of all |

`linear` is PEFT's, cheap and not the sum: even n adapters that share one A come out n times too
large. Take `cat`, or `svd` where the rank has to stay. The kinds that drop entries by size or by
chance (`ties`, `dare_*`, `magnitude_prune`) are refused: they were made for differences of whole
weights, and what is small in A or B is not what is small in B A. PEFT gives the new adapter one
rank for all modules, the largest there is; here each module has the rank it needs, so that experts
stay small.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import AuxiliaryTrainingWrapper

from .beside import BesideLora

KINDS = ("svd", "linear", "cat")
# One matrix of A and of B for each module: [n, r, in] and [n, out, r], n = 1 for a plain linear.
Pair = tuple[torch.Tensor, torch.Tensor]


def add_weighted_adapter(
    tuner: LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    **options: Any,
) -> None:
    """Add the weighted sum of adapters as one more, not active yet.

    Args:
        tuner: PEFT's model of a model of ours.
        adapters: names of those that are there.
        weights: one for each, of any sign.
        adapter_name: of the sum; one that is there already is left as it is, as PEFT does it.
        combination_type: "svd", "linear" or "cat".
        svd_rank: of "svd" alone; None for the largest rank of a module's adapters.
        options: PEFT's others, which are refused unless they are None or PEFT's default.

    Raises:
        ValueError: names, weights or ranks that do not fit, adapters beside different experts.
        NotImplementedError: a kind or an option that is not there, or modules of other kinds.
    """
    if adapter_name in tuner.peft_config:
        return
    _check(tuner, adapters, weights, combination_type, options)
    layers = _layers(tuner, adapters)
    ranks = {
        name: _rank(name, layer, adapters, combination_type, svd_rank)
        for name, layer in layers.items()
    }
    sums = {
        name: [
            _combine(found, combination_type, ranks[name])
            for found in _weighted(name, layer, adapters, weights)
        ]
        for name, layer in layers.items()
    }
    trained = [p for p in tuner.model.parameters() if p.requires_grad]
    tuner.peft_config[adapter_name] = _config(tuner, adapters, ranks)
    tuner.inject_adapter(tuner.model, adapter_name)
    for parameter in trained:
        # A frozen newcomer freezes whoever is active.
        parameter.requires_grad_(True)
    for name, layer in layers.items():
        for (a, b), (new_a, new_b) in zip(_pairs(layer, adapter_name), sums[name], strict=True):
            a.data.copy_(new_a.reshape(a.shape))
            b.data.copy_(new_b.reshape(b.shape))
            a.requires_grad_(False)
            b.requires_grad_(False)


def _check(
    tuner: LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    kind: str,
    options: dict[str, Any],
) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"add_weighted_adapter: wanted a weight for each adapter, got {len(adapters)} adapters "
            f"and {len(weights)} weights"
        )
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown:
        raise ValueError(
            f"add_weighted_adapter: wanted adapters out of {', '.join(tuner.peft_config)}, got "
            f"{', '.join(unknown)}"
        )
    if kind not in KINDS:
        raise NotImplementedError(
            f"add_weighted_adapter: wanted one of {', '.join(KINDS)}, got {kind!r}; kinds that "
            "drop entries by size or chance do that to A and B, whose small entries are not the "
            "small ones of B A"
        )
    given = {"svd_full_matrices": True, "majority_sign_method": "total"}
    wrong = [name for name, value in options.items() if value not in (None, given.get(name))]
    if wrong:
        raise NotImplementedError(
            f"add_weighted_adapter: {', '.join(wrong)} would change nothing here, or clamp the "
            "sum; leave it out"
        )


def _layers(tuner: LoraModel, adapters: Sequence[str]) -> dict[str, LoraLayer]:
    """Modules that one of the adapters adapts, by name."""
    found: dict[str, LoraLayer] = {}
    for name, module in tuner.model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise NotImplementedError(
                f"add_weighted_adapter: {name} is trained whole (modules_to_save, trainable "
                "tokens); only low ranks can be added up"
            )
        if not isinstance(module, LoraLayer):
            continue
        own = [a for a in adapters if a in module.lora_A or a in module.lora_embedding_A]
        if own and not isinstance(module, BesideLora | PeftLinear):
            raise NotImplementedError(
                f"add_weighted_adapter: wanted adapters of linear maps and experts, got one of "
                f"{name} ({type(module.get_base_layer()).__name__})"
            )
        if any(a in module.lora_variant or module.lora_bias.get(a) for a in own):
            raise NotImplementedError(
                f"add_weighted_adapter: wanted plain low ranks, got a variant or a bias at {name}"
            )
        if own:
            found[name] = module
    return found


def _pairs(layer: LoraLayer, adapter: str) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    banks = layer._bank_pairs() if isinstance(layer, BesideLora) else [(layer.lora_A, layer.lora_B)]
    return [(a[adapter].weight, b[adapter].weight) for a, b in banks]


def _weighted(
    name: str, layer: LoraLayer, adapters: Sequence[str], weights: Sequence[float]
) -> list[list[tuple[Pair, float]]]:
    """For each matrix of a module: every adapter's A and B in float32 or wider, and w_i s_i."""
    own = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.lora_A]
    chosen = getattr(layer, "hot", {})
    if len({tuple(chosen[a]) if a in chosen else None for a, _ in own}) > 1:
        raise ValueError(
            f"add_weighted_adapter: wanted adapters beside the same experts, got different ones at "
            f"{name}; keep them apart and make both active instead"
        )
    found: list[list[tuple[Pair, float]]] = [[] for _ in _pairs(layer, own[0][0])]
    for adapter, weight in own:
        for sums, (a, b) in zip(found, _pairs(layer, adapter), strict=True):
            wide = torch.promote_types(a.dtype, torch.float32)
            pair = a.detach().to(wide), b.detach().to(wide)
            if a.dim() == 2:
                pair = pair[0][None], pair[1][None]
            sums.append((pair, weight * layer.scaling[adapter]))
    return found


def _rank(
    name: str, layer: LoraLayer, adapters: Sequence[str], kind: str, svd_rank: int | None
) -> int:
    """Rank of the sum in a module."""
    ranks = [layer.r[a] for a in adapters if a in layer.lora_A]
    if kind == "cat":
        return sum(ranks)
    if kind == "svd":
        return min(svd_rank or max(ranks), sum(ranks))
    if len(set(ranks)) > 1:
        raise ValueError(
            f"add_weighted_adapter: 'linear' wants equal ranks, got {ranks} at {name}; use 'cat' "
            "or 'svd'"
        )
    return ranks[0]


def _combine(found: list[tuple[Pair, float]], kind: str, rank: int) -> Pair:
    """One matrix's A [n, rank, in] and B [n, out, rank], of scale 1."""
    if kind == "linear":
        # A sign enters once.
        signed = [(math.sqrt(abs(w)), math.copysign(1, w)) for _, w in found]
        a = sum(a * (root * sign) for ((a, _), _), (root, sign) in zip(found, signed, strict=True))
        b = sum(b * root for ((_, b), _), (root, _) in zip(found, signed, strict=True))
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        return a, b
    a = torch.cat([a * weight for (a, _), weight in found], dim=1)
    b = torch.cat([b for (_, b), _ in found], dim=2)
    return (a, b) if kind == "cat" else _nearest(a, b, rank)


def _nearest(a: torch.Tensor, b: torch.Tensor, rank: int) -> Pair:
    """The nearest product of a rank to B A, without ever forming that [out, in]."""
    left, inner_left = torch.linalg.qr(b)
    right, inner_right = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
    size = min(rank, s.shape[-1])
    root = s[:, :size].sqrt()
    new_a = root[..., None] * (vh[:, :size] @ right.mT)
    new_b = left @ u[..., :size] * root[:, None]
    # Fewer than `rank` where the matrix itself is smaller.
    pad = rank - size
    return (
        torch.nn.functional.pad(new_a, (0, 0, 0, pad)),
        torch.nn.functional.pad(new_b, (0, pad)),
    )


def _config(tuner: LoraModel, adapters: Sequence[str], ranks: dict[str, int]) -> LoraConfig:
    """Description of the sum: scale 1 everywhere, each module's rank."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = sorted(set(ranks.values()) - {common})
    patterns = {
        "|".join(re.escape(name) for name, r in ranks.items() if r == rank): rank for rank in others
    }
    configs = [tuner.peft_config[name] for name in adapters]
    kept: dict[str, Any] = {}
    for config in configs:
        kept |= config.auto_mapping or {}
    # Exactly these modules: the adapters' own patterns need not have one form.
    return replace(
        configs[0],
        auto_mapping=kept or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        target_modules="|".join(re.escape(name) for name in ranks),
        r=common,
        lora_alpha=common,
        use_rslora=False,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        lora_dropout=0.0,
        init_lora_weights=True,
        inference_mode=True,
    )
