# SPDX-License-Identifier: Apache-2.0
"""Packed storage: the release's bytes, bit for bit what its rounding gives, read in pieces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache, Dsv4Config
from modeling_dsv4.cache_storage import PackedRows, RowCodec, entry_codec, key_codec
from modeling_dsv4.formats import simulate_fp4
from modeling_dsv4.simulation import Rounding

KINDS = ["v4", "v41"]
# Channels of whole groups, so that the simulation runs: 64 + 32 rotary, 32 of an index key.
WHOLE = {"head_dim": 96, "qk_rope_head_dim": 32, "index_head_dim": 32}
Make = Callable[..., Any]


def _packed(model: Any, **more: Any) -> Dsv4Cache:
    return Dsv4Cache(model.config, storage="packed", **more)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor, cache: Any, sizes: list[int]) -> torch.Tensor:
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, 1)


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "packed", "plain"),
    [
        ("v4-flash", 3514, 6880),
        ("v4-flash-0731", 3514, 6880),
        ("v4-pro", 5031, 9848),
        ("v4-pro-0813", 5031, 9848),
        ("v4.1-flash", 890, 3200),
    ],
)
def test_a_token_costs_what_the_release_says(
    golden_dir: Path, release: str, packed: int, plain: int
) -> None:
    config = Dsv4Config.from_json_file(golden_dir / "configs" / f"{release}.json")
    assert int(Dsv4Cache.bytes_per_token(config, "packed")) == packed
    assert int(Dsv4Cache.bytes_per_token(config)) == plain
    wanted = 288 if release == "v4.1-flash" else 584
    assert entry_codec(config).nbytes(torch.bfloat16) == wanted
    assert key_codec(config).nbytes(torch.bfloat16) == 68


def test_other_channel_counts_follow_the_same_rule(tiny_config: Make) -> None:
    v4, v41 = tiny_config("v4"), tiny_config("v41", head_dim=34)
    # 8 codes, 1 scale and 8 rotary channels; 17 bytes of codes and 3 scales; 4 bytes and 1 scale.
    assert entry_codec(v4).nbytes(torch.bfloat16) == 28
    assert entry_codec(v4).nbytes(torch.float32) == 44
    assert entry_codec(v41).nbytes(torch.bfloat16) == 20
    assert key_codec(v4).nbytes(torch.bfloat16) == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_cache_grows_by_the_bytes_of_its_tokens(
    tiny: Make, kind: str, dtype: torch.dtype
) -> None:
    model, ids = tiny(kind, dtype), torch.randint(3, 64, (1, 128))
    for storage in ("packed", "plain"):
        held = []
        for length in (64, 128):
            cache = Dsv4Cache(model.config, storage=storage)
            _logits(model, ids[:, :length], cache, [length])
            held.append(cache.memory_bytes())
        assert held[1] - held[0] == 64 * Dsv4Cache.bytes_per_token(model.config, storage, dtype)


def test_an_unknown_storage_is_refused(tiny_config: Make) -> None:
    with pytest.raises(ValueError, match="wanted one of plain, packed, got 'fp8'"):
        Dsv4Cache(tiny_config("v4"), storage="fp8")


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_packing_rounds_as_the_simulation_does_and_only_once(
    tiny_config: Make, kind: str, dtype: torch.dtype
) -> None:
    config = tiny_config(kind, **WHOLE)
    rounding = Rounding.of(config)
    cases: list[tuple[RowCodec, Callable[..., torch.Tensor]]] = [
        (entry_codec(config), rounding.entry),
        (key_codec(config), lambda x: simulate_fp4(x, 32)),
    ]
    for codec, simulate in cases:
        size = torch.exp2(torch.rand(4, 2000, 1) * 30 - 20)
        x = (torch.randn(4, 2000, codec.channels) * size).to(dtype)
        rounded = simulate(x)
        found = codec.decode(codec.encode(x), dtype)
        # This largest magnitude is taken for an already rounded one (see `pack_fp4_e4m3`).
        same = (x.unflatten(-1, (-1, 16)).abs().amax(-1) != 2.0**-6).all(-1)
        assert torch.equal(found[same], rounded[same])
        again = codec.decode(codec.encode(rounded), dtype)
        assert torch.equal(again, rounded) and torch.equal(again.signbit(), rounded.signbit())
        assert not torch.equal(rounded, x)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_read_by_slices_and_by_ids(tiny_config: Make, kind: str) -> None:
    codec = entry_codec(tiny_config(kind))
    x = torch.randn(2, 9, codec.channels, dtype=torch.bfloat16)
    rows = PackedRows(codec.encode(x), codec, x.dtype)
    full = rows[:, :]
    assert rows.shape == x.shape and rows.dtype == x.dtype and rows.device == x.device
    assert full.shape == x.shape and full.dtype == x.dtype
    assert (full - x).abs().max() < 0.4 * x.abs().max()
    assert torch.equal(rows[:, 2:7], full[:, 2:7]) and rows[:, 4:4].shape == (2, 0, 16)
    alone = PackedRows(codec.encode(x[:1, 3:4]), codec, x.dtype)
    assert torch.equal(alone[:, :], full[:1, 3:4])
    ids = torch.tensor([[[8, 0, -1]], [[3, 3, 5]]], dtype=torch.int32)
    expected = torch.stack([full[b, ids[b].clamp(min=0).long()] for b in range(2)])
    assert torch.equal(rows.take(ids), expected)


def test_rows_that_are_no_numbers_are_refused(tiny_config: Make) -> None:
    for kind in KINDS:
        codec = entry_codec(tiny_config(kind))
        with pytest.raises(ValueError, match="wanted finite numbers"):
            codec.encode(torch.full((1, 1, codec.channels), torch.nan))


# --- models -------------------------------------------------------------------------------------

SIZES = [97, 1, 1, 1, 50]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packing_changes_no_bit_under_simulation(
    tiny: Make, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(kind, dtype, **WHOLE), torch.randint(3, 64, (2, 150))
    model.set_simulation("official")
    taken: list[torch.Tensor] = []
    take = PackedRows.take
    monkeypatch.setattr(PackedRows, "take", lambda s, ids: taken.append(ids) or take(s, ids))
    plain = _logits(model, ids, Dsv4Cache(model.config), SIZES)
    assert not taken
    assert torch.equal(_logits(model, ids, _packed(model), SIZES), plain)
    assert taken


@pytest.mark.parametrize("kind", KINDS)
def test_without_simulation_packing_rounds_the_entries_and_nothing_else(
    tiny: Make, kind: str
) -> None:
    class EntriesOnly(Rounding):
        def key(self, k: torch.Tensor) -> torch.Tensor:
            return k

        def entry(self, e: torch.Tensor) -> torch.Tensor:
            return super().entry(e) if self.entries_in_fp4 else super().key(e)

    # Every entry is read, so that the index keys' rounding chooses nothing.
    wide = {"index_topk": 512, "candidate_topk_blocks": 512, "candidate_block_size": 2}
    model = tiny(kind, torch.float64, **WHOLE, **wide)
    ids = torch.randint(3, 64, (2, 150))
    exact = _logits(model, ids, Dsv4Cache(model.config), SIZES)
    packed = _logits(model, ids, _packed(model), SIZES)
    rounding = EntriesOnly(**vars(Rounding.of(model.config)))
    for layer in model.model.layers:
        layer.self_attn.rounding = rounding
    rounded = _logits(model, ids, Dsv4Cache(model.config), SIZES)
    assert torch.equal(packed, rounded)
    assert (packed - exact).abs().max() > 0.01


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny: Make) -> Any:
    return tiny(request.param, torch.float64)


def test_packed_chunks_equal_one_packed_pass(model: Any) -> None:
    # Also the first pass reads what is stored, or its length would be seen in the logits.
    ids = torch.randint(3, 64, (2, 61))
    one = _logits(model, ids, _packed(model), [61])
    for sizes in ([1] * 5 + [56], [30, 1, 30], [8, 53]):
        found = _logits(model, ids, _packed(model), sizes)
        torch.testing.assert_close(found, one, atol=1e-10, rtol=0)


@torch.no_grad()
def test_packed_rows_are_cropped_repeated_and_reordered(model: Any) -> None:
    ids, more = torch.randint(3, 64, (2, 50)), torch.randint(3, 64, (3, 9))
    cache = _packed(model)
    _logits(model, ids, cache, [40, 10])
    cache.crop(-13)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    fresh = _packed(model)
    _logits(model, ids[[1, 0, 1], :37], fresh, [37])
    found, expected = (model(more, past_key_values=c).logits for c in (cache, fresh))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoding_step_unpacks_what_it_chose_and_its_keys_alone(
    tiny: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(kind), torch.randint(3, 64, (1, 401))
    cache = _packed(model)
    _logits(model, ids[:, :400], cache, [400])
    decode, read = RowCodec.decode, []

    def counted(self: RowCodec, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        read.append((self.channels, packed[..., 0].numel()))
        return decode(self, packed, dtype)

    monkeypatch.setattr(RowCodec, "decode", counted)
    _logits(model, ids[:, 400:], cache, [1])
    entries = [rows for channels, rows in read if channels == model.config.head_dim]
    # V4's layer of W = 8 reads all its 50 entries, of which there is one for every 8 tokens.
    assert sorted(set(entries)) == ([4, 50] if kind == "v4" else [4])


def test_packed_storage_has_no_gradients_and_says_so(model: Any) -> None:
    ids, cache = torch.randint(3, 64, (1, 20)), _packed(model)
    with pytest.raises(ValueError, match=r"no gradients: wanted torch.no_grad\(\)"):
        model(ids, past_key_values=cache)
    assert not cache.is_initialized
    expected = _logits(model, ids, _packed(model), [20])
    assert torch.equal(_logits(model, ids, cache, [20]), expected)


@torch.no_grad()
def test_poisoned_bytes_do_not_outlive_a_reset(model: Any) -> None:
    cache, ids = _packed(model), torch.randint(3, 64, (2, 33))
    _logits(model, ids, cache, [33])
    for _, store in cache.named_stores():
        if store.data is not None and store.data.dtype == torch.uint8:
            store.data.fill_(0xFF)
    cache.reset()
    assert torch.equal(_logits(model, ids, cache, [33]), _logits(model, ids, _packed(model), [33]))


def test_text_is_generated_from_a_packed_cache(tiny: Make) -> None:
    for kind in KINDS:
        model, ids = tiny(kind, torch.float64, **WHOLE), torch.randint(3, 64, (2, 40))
        model.set_simulation("official")
        texts = [
            model.generate(
                ids,
                past_key_values=cache,
                max_new_tokens=6,
                do_sample=False,
                num_beams=2,
                eos_token_id=None,
                pad_token_id=2,
            )
            for cache in (None, _packed(model))
        ]
        assert torch.equal(*texts)
