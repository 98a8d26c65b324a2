# SPDX-License-Identifier: Apache-2.0
"""Bits go where they lower the error most, never beyond the budget."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from modeling_dsv4 import ops
from modeling_dsv4.formats import get_format
from quantize.allocation import allocate, choose_recipe, sensitivity
from quantize.calibration import Calibration
from quantize.config import Recipe
from quantize.source import Source

NANO = Path(__file__).parents[3] / "models" / "nano-v41"


def brute_force(errors: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """Least total error of all choices that fit."""
    choices = itertools.product(*(range(len(e)) for e in errors))
    return min(
        sum(e[o] for e, o in zip(errors, choice, strict=True))
        for choice in choices
        if sum(s[o] for s, o in zip(sizes, choice, strict=True)) <= budget
    )


def problem(items: int, options: int) -> tuple[list[list[float]], list[list[int]]]:
    sizes = torch.randint(1, 60, (items, options)).sort(-1).values
    errors = (0.9 ** sizes.double()) * torch.rand(items, 1).double() * 10
    return (errors * (0.8 + 0.4 * torch.rand(items, options))).tolist(), sizes.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_nothing_that_fits_is_better_by_more_than_one_step(seed: int) -> None:
    torch.manual_seed(seed)
    errors, sizes = problem(5, 4)
    for budget in range(sum(map(min, sizes)), sum(map(max, sizes)) + 1, 7):
        found = allocate(errors, sizes, budget)
        taken = sum(s[o] for s, o in zip(sizes, found, strict=True))
        lost = sum(e[o] for e, o in zip(errors, found, strict=True))
        assert taken <= budget
        # No choice of the same bytes is better as long as no step was too large for what was left.
        best = brute_force(errors, sizes, budget)
        assert best <= lost + 1e-12
        assert lost - best <= max(max(e) - min(e) for e in errors)


def test_a_budget_at_a_step_is_used_as_well_as_can_be() -> None:
    errors = [[8.0, 2.0, 1.0], [4.0, 1.0, 0.5], [0.8, 0.2, 0.1]]
    sizes = [[2, 3, 4]] * 3
    # The steps by gain: 6, 3, 1, 0.6, 0.5, 0.1.
    wanted = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [2, 1, 0], [2, 1, 1], [2, 2, 1], [2, 2, 2]]
    for budget, choice in zip(range(6, 13), wanted, strict=True):
        assert allocate(errors, sizes, budget) == choice
        lost = sum(e[o] for e, o in zip(errors, choice, strict=True))
        assert lost == pytest.approx(brute_force(errors, sizes, budget))


def test_options_that_no_budget_wants_are_never_chosen() -> None:
    # The second is larger and worse than the first, the third lies above a line between others.
    errors, sizes = [[5.0, 6.0, 4.9, 0.0]], [[10, 11, 19, 20]]
    assert [allocate(errors, sizes, b)[0] for b in (10, 19, 20, 99)] == [0, 0, 3, 3]


def test_a_step_too_large_does_not_stop_smaller_ones() -> None:
    errors, sizes = [[100.0, 0.0], [1.0, 0.5]], [[1, 100], [1, 3]]
    assert allocate(errors, sizes, 10) == [0, 1]


def test_a_budget_below_the_smallest_formats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"wanted a budget of at least 12 B .* got 11 B"):
        allocate([[1.0], [1.0]], [[4], [8]], 11)


def test_sensitivity_is_the_error_of_the_output() -> None:
    gate_up, down, x = torch.randn(2, 64, 96) / 8, torch.randn(96, 64) / 8, torch.randn(40, 96)
    fmt = get_format("trellis2")

    def out(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return F.linear(ops.swiglu(F.linear(x, gate_up.flatten(0, 1)), 7.0), down)

    def rounded(w: torch.Tensor) -> torch.Tensor:
        return fmt.unpack(fmt.pack(w), torch.float32)

    found = sensitivity(gate_up, down, x, 7.0, ["trellis2", "trellis4"])
    right = out(gate_up, down)
    for name, y in (("gate_up_proj", out(rounded(gate_up), down)),
                    ("down_proj", out(gate_up, rounded(down)))):  # fmt: skip
        want = float((y - right).square().sum() / right.square().sum())
        assert found[name]["trellis2"] == pytest.approx(want, rel=0.25)
        assert found[name]["trellis4"] < 0.15 * found[name]["trellis2"]


def calibration(source: Source, hot: int) -> Calibration:
    """Statistics of a text in which one expert of each layer is chosen 100 times as often."""
    tensors = {}
    for name, experts in source.experts.items():
        counts = torch.full((experts.num_experts,), 10)
        counts[hot % experts.num_experts] = 1000
        d, f = source.config.hidden_size, source.config.moe_intermediate_size
        tensors[f"{name}.counts"] = counts
        tensors[f"{name}.sample"] = torch.randn(16, d).bfloat16()
        tensors[f"{name}.down_proj.diagonal"] = counts[:, None].float().expand(-1, f)
    return Calibration.of(tensors)


def size(source: Source, recipe: Recipe) -> int:
    config = source.config
    return sum(
        get_format(str(recipe.format_of(f"{name}.{e}.{projection}"))).nbytes(shape)
        for name, experts in source.experts.items()
        for e in range(experts.num_experts)
        for projection, shape in (
            ("gate_up_proj", (2, config.moe_intermediate_size, config.hidden_size)),
            ("down_proj", (config.hidden_size, config.moe_intermediate_size)),
        )
    )


def test_experts_that_are_chosen_often_get_more_bits() -> None:
    source, heard = Source(NANO), []
    weights = sum(e.num_experts for e in source.experts.values()) * 3 * 192 * 96
    budget = int(weights * 3.0 / 8)
    recipe = choose_recipe(source, budget, calibration(source, hot=5), heard.append)
    assert heard == list(source.experts)
    assert 0.85 * budget < size(source, recipe) <= budget
    for name, experts in source.experts.items():
        bits = [
            sum(get_format(str(recipe.format_of(f"{name}.{e}.{p}"))).bits for p in
                ("gate_up_proj", "gate_up_proj", "down_proj")) for e in range(experts.num_experts)
        ]  # fmt: skip
        hot = bits.pop(5 % experts.num_experts)
        assert hot > max(bits)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_an_expert_that_rounds_worse_gets_more_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantize import allocation

    source, plain = Source(NANO), allocation.sensitivity
    order = iter([e for m in source.experts.values() for e in range(m.num_experts)])

    def uneven(*arguments: Any) -> dict[str, dict[str, float]]:
        found = plain(*arguments)
        factor = 30.0 if next(order) == 2 else 1.0
        return {p: {k: factor * v for k, v in errors.items()} for p, errors in found.items()}

    monkeypatch.setattr(allocation, "sensitivity", uneven)
    weights = sum(e.num_experts for e in source.experts.values()) * 3 * 192 * 96
    recipe = choose_recipe(source, int(weights * 3.0 / 8))
    assert next(order, None) is None
    for name, experts in source.experts.items():
        bits = [
            get_format(str(recipe.format_of(f"{name}.{e}.down_proj"))).bits
            for e in range(experts.num_experts)
        ]
        assert bits.pop(2) > max(bits)


def test_without_calibration_every_expert_of_a_layer_counts_alike() -> None:
    source = Source(NANO)
    weights = sum(e.num_experts for e in source.experts.values()) * 3 * 192 * 96
    recipe = choose_recipe(source, int(weights * 2.6 / 8))
    down, gate_up = (
        [get_format(str(recipe.format_of(f"{name}.{e}.{p}"))).bits
         for name in source.experts for e in range(16)] for p in ("down_proj", "gate_up_proj")
    )  # fmt: skip
    assert sum(down) > sum(gate_up)


def test_a_release_keeps_its_own_format_where_there_is_room(golden_dir: Path) -> None:
    source = Source(golden_dir / "v4_a_fp8")
    recipe = choose_recipe(source, 10**9)
    held = {e.weight_format.name for e in source.experts.values() if e.weight_format}
    assert {found for _, found in recipe.rules} == held
