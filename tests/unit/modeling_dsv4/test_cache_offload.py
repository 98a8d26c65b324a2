# SPDX-License-Identifier: Apache-2.0
"""Entries that lie elsewhere: no bit changes, only what is chosen is fetched, memory stays."""

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling_dsv4 import Dsv4Cache, cache_tiers
from modeling_dsv4.cache_offload import FarRows, FarStore, OffloadCounts
from modeling_dsv4.cache_storage import PackedRows, PlainCodec, entry_codec, parts_per_token
from modeling_dsv4.cache_tiers import FileRows, HostRows

KINDS, TIERS = ["v4", "v41"], ["cpu", "disk"]
Make = Callable[..., Any]


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


@pytest.fixture(params=TIERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Where entries lie."""
    return "cpu" if request.param == "cpu" else tmp_path / "kv"


@torch.no_grad()
def _live(model: Any, cache: Dsv4Cache, ids: torch.Tensor, folder: Path) -> list[torch.Tensor]:
    """All that can happen to a cache, of two texts of unequal length; logits of every pass."""
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    out, at = [], 0
    for n in (60, 1, 1, 30, 1, 1, 90):
        part = slice(at, at + n)
        given = {"attention_mask": mask[:, : at + n], "past_key_values": cache}
        out.append(model(ids[:, part], **given).logits)
        at += n
        if n == 30:
            cache.crop(-7)
            at -= 7
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    out.append(model(ids[[0, 1, 0], :5], past_key_values=cache).logits)
    other = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    out.append(model(ids[[0, 1, 0], 5:9], past_key_values=cache).logits)
    out.append(model(ids[[1, 1, 0], 5:6], past_key_values=other).logits)
    other.save(folder / "cache")
    third = Dsv4Cache.load(folder / "cache", model.config, offload=cache.offload)
    for c in (other, third):
        out.append(model(ids[[0, 1, 1], 20:27], past_key_values=c).logits)
    assert torch.equal(out[-1], out[-2])
    cache.reset()
    out.append(model(ids[:1, :50], past_key_values=cache).logits)
    out.append(model(ids[:1, 50:51], past_key_values=cache).logits)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_no_bit_changes_whatever_happens_to_the_cache(
    tiny: Make, tmp_path: Path, place: str | Path, kind: str, storage: str
) -> None:
    model, ids = tiny(kind, torch.bfloat16), _ids(2, 190)
    expected = _live(model, Dsv4Cache(model.config, 20, storage), ids, tmp_path)
    cache = Dsv4Cache(model.config, 20, storage, offload=place)
    found = _live(model, cache, ids, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert cache.offload_counts.kv_rows > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_a_compiler_and_without_its_systems_help_is_the_same(
    tiny: Make, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeling_dsv4.cpu import rows

    model, ids = tiny(kind), _ids(2, 190)
    expected = _live(model, Dsv4Cache(model.config, 20), ids, tmp_path)
    monkeypatch.setattr(rows, "_function", lambda *_: None)
    monkeypatch.setattr(rows, "_NO_WAIT", None)
    cache = Dsv4Cache(model.config, 20, offload=tmp_path)
    found = _live(model, cache, ids, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert cache.offload_counts.kv_waits > 0


@torch.inference_mode()
def test_passes_in_inference_mode_are_the_same(tiny: Make, place: str | Path) -> None:
    model, ids = tiny("v41"), _ids(2, 70)
    out = []
    for offload in (None, place):
        cache = Dsv4Cache(model.config, offload=offload)
        parts = ids.split([60, 1, 9], dim=1)
        out.append([model(part, past_key_values=cache).logits for part in parts])
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


@torch.no_grad()
def test_the_attention_kernel_reads_fetched_entries_as_resident_ones(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeling_dsv4 import attention

    monkeypatch.setattr(attention, "_FETCHED_NUMBERS", 2 * 4 * 16 * 3)
    block = tiny("v4").model.layers[1].self_attn
    q, k, x = torch.randn(2, 5, 4, 16), torch.randn(2, 12, 16), torch.randn(2, 40, 16)
    ids = torch.randint(0, 40, (2, 5, 4), dtype=torch.int32)
    ids[0, 1, 2:], ids[1, 4] = -1, -1
    first, turn = torch.tensor([[0], [3]]).expand(2, 5), torch.randn(2, 5, 4, 2)
    from modeling_dsv4.kernels.attention import Reads, attend

    reads = Reads(first, ids, None, None, 7, block.config.sliding_window)
    expected = attend(q, k, x, block.sinks, block.scaling, reads, turn)
    for store in _stores(tmp_path, PlainCodec(16)):
        store.extend(x[:, :30], None, torch.full((2,), 30))
        rows = store.extend(x[:, 30:], torch.full((2,), 30), torch.full((2,), 10))
        # Two blocks of queries, of three and two.
        found = block._attend_far(q, k, rows, ids, first, 7, turn)
        assert torch.equal(found, expected)
        assert store.counts.kv_gathers in (2, 4)


# --- how much -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["plain", "packed"])
@torch.no_grad()
def test_memory_grows_by_index_keys_alone_and_the_file_by_entries(
    tiny: Make, tmp_path: Path, kind: str, storage: str
) -> None:
    model, held = tiny(kind, torch.bfloat16), []
    for length in (64, 128):
        cache = Dsv4Cache(model.config, storage=storage, offload=tmp_path)
        model(_ids(2, length), past_key_values=cache)
        held.append((cache.memory_bytes(), cache.disk_bytes()))
    parts = parts_per_token(model.config, storage)
    assert held[1][0] - held[0][0] == 2 * 64 * parts["index_keys"]
    entries = parts["chosen_entries"] + parts["dense_entries"]
    assert held[1][1] - held[0][1] == 2 * 64 * entries > 0


@torch.no_grad()
def test_a_step_fetches_what_it_chose_and_no_more(
    tiny: Make, place: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache, asked = tiny("v41"), None, []
    cache = Dsv4Cache(model.config, offload=place)
    model(_ids(2, 300), past_key_values=cache)
    kind = HostRows if place == "cpu" else FileRows
    fetch = kind.fetch
    monkeypatch.setattr(
        kind, "fetch", lambda self, rows, n: asked.append((self, len(rows))) or fetch(self, rows, n)
    )
    monkeypatch.setattr(kind, "fetch_block", lambda *_: pytest.fail("read all"))
    model(_ids(2, 1), past_key_values=cache)
    # Index sources are layers 1, 3 and 5; the layers between share what was fetched.
    stores = [cache.layers[i].entries for i in (1, 3, 3)]
    assert [store for store, _ in asked] == stores
    assert all(0 < rows <= 2 * model.config.index_topk + 2 for _, rows in asked)


@torch.no_grad()
def test_long_reads_go_in_blocks(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeling_dsv4 import cache_offload

    model, ids, sizes = tiny("v4"), _ids(2, 190), []
    expected = _live(model, Dsv4Cache(model.config, 20), ids, tmp_path)
    for module in (cache_offload, cache_tiers):
        monkeypatch.setattr(module, "BLOCK_BYTES", 3 * 2 * 64)
    fetch = FileRows.fetch_block
    monkeypatch.setattr(
        FileRows, "fetch_block", lambda s, a, b: sizes.append(b - a) or fetch(s, a, b)
    )
    found = _live(model, Dsv4Cache(model.config, 20, offload=tmp_path), ids, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert max(sizes) <= 6


@torch.no_grad()
def test_files_have_no_name_and_end_with_the_cache(tiny: Make, tmp_path: Path) -> None:
    model, folder = tiny("v4"), tmp_path / "a" / "kv"
    cache = Dsv4Cache(model.config, offload=folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    # What earlier tests left behind must not go while this one counts.
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    model(_ids(1, 40), past_key_values=cache)
    assert cache.disk_bytes() > 0 and not list(folder.iterdir())
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 3
        del cache
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before


# --- rows ---------------------------------------------------------------------------------------


def _stores(tmp_path: Path, codec: Any) -> list[FarStore]:
    counts = OffloadCounts()
    return [HostRows(codec, counts), FileRows(codec, counts, tmp_path)]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_by_ids_in_order_and_alone(tiny_config: Make, tmp_path: Path, packed: bool) -> None:
    codec: Any = entry_codec(tiny_config("v4")) if packed else PlainCodec(16)
    x = torch.randn(3, 200, 16, dtype=torch.bfloat16)
    x = codec.decode(codec.encode(x), x.dtype)
    for store in _stores(tmp_path, codec):
        first = store.extend(x[:, :50], None, torch.full((3,), 50))
        assert isinstance(first, PackedRows if packed else torch.Tensor)
        store.extend(x[:, 50:199], torch.full((3,), 50), torch.full((3,), 149))
        rows = store.extend(x[:, 199:], torch.full((3,), 199), torch.ones(3, dtype=torch.long))
        assert isinstance(rows, FarRows) and rows.shape == (3, 200, 16)
        assert torch.equal(rows[:, :], x) and torch.equal(rows[:, 7:90], x[:, 7:90])
        batch = torch.arange(3)[:, None, None]
        for shape in ((3, 1, 5), (3, 40, 9), (3, 2, 200)):
            ids = torch.randint(-1, 200, shape, dtype=torch.int32)
            assert torch.equal(rows.take(ids), x[batch, ids.clamp(min=0)])
            only = rows.only(ids)
            named = torch.zeros(3, 200, dtype=torch.bool)
            named[batch, ids.clamp(min=0).long()] = True
            assert torch.equal(only, torch.where(named[..., None], x, 0))
        assert torch.equal(codec.decode(codec.encode(x), x.dtype), x)
        held = store.held()
        assert (held.dtype, tuple(held.shape)) == store.layout()
        assert torch.equal(held, codec.stored(codec.encode(x), x.dtype))


def test_rows_that_were_taken_back_are_fetched_anew(tmp_path: Path) -> None:
    x, ids = torch.randn(1, 60, 8), torch.tensor([[[3, 49, 50]]])
    for store in _stores(tmp_path, PlainCodec(8)):
        store.extend(x[:, :40], None, torch.tensor([40]))
        one = store.extend(x[:, 40:51], torch.tensor([40]), torch.tensor([11]))
        assert torch.equal(one.take(ids), x[:, [3, 49, 50]][:, None])
        two = store.extend(x[:, 51:57], torch.tensor([45]), torch.tensor([6]))
        expected = x[:, [3, 55, 56]][:, None]
        assert torch.equal(two.take(ids), expected)
        # Layers that share ids share what was fetched; other ids of the same shape do not.
        assert two.take(ids) is two.take(ids)
        assert torch.equal(two.take(ids - 1)[0, 0, 0], x[0, 2])


def test_neighbours_are_one_read(tmp_path: Path) -> None:
    x, counts = torch.randn(2, 4000, 64), OffloadCounts()
    store = FileRows(PlainCodec(64), counts, tmp_path)
    store.extend(x[:, :3999], None, torch.tensor([3999, 3999]))
    rows = store.extend(x[:, 3999:], torch.tensor([3999, 3999]), torch.tensor([1, 1]))
    ids = torch.tensor([[[5, 6, 7, 9, 500, 900]], [[5, 6, 7, 9, 500, 900]]])
    assert torch.equal(rows.take(ids), x[torch.arange(2)[:, None, None], ids])
    assert (counts.kv_gathers, counts.kv_rows, counts.kv_reads) == (1, 12, 6)
    assert counts.kv_bytes == 12 * 256


def test_reordering_copies_only_rows_that_stand_twice(tmp_path: Path) -> None:
    x, store = torch.randn(3, 30, 8), FileRows(PlainCodec(8), OffloadCounts(), tmp_path)
    store.extend(x, None, torch.full((3,), 30))
    for order in ([2, 0, 1], [0, 0, 2], [1, 1], [0, 1, 1, 0]):
        before = list(store.slots)
        store.select(torch.tensor(order), in_place=False)
        x = x[order]
        assert torch.equal(store.held(), x)
        assert len(set(store.slots)) == len(order)
        kept = [before[i] for i in dict.fromkeys(order)]
        assert [slot for slot in store.slots if slot in before and slot in kept] == kept


# --- what is refused ----------------------------------------------------------------------------


def test_what_cannot_be_offloaded_is_refused(tiny: Make, tmp_path: Path) -> None:
    model, file = tiny("v4"), tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="offload and max_length"):
        Dsv4Cache(model.config, max_length=100, offload="cpu")
    for path in (file, file / "below"):
        with pytest.raises(ValueError, match='wanted "cpu" or a directory'):
            Dsv4Cache(model.config, offload=path)
    with pytest.raises(ValueError, match="a cache with offload has no gradients"):
        model(_ids(1, 5), past_key_values=Dsv4Cache(model.config, offload="cpu"))


@torch.no_grad()
def test_a_full_disk_ends_the_pass_and_the_cache_says_so(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny("v4"), Dsv4Cache(tiny("v4").config, offload=tmp_path)
    model(_ids(1, 20), past_key_values=cache)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            model(_ids(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="did not finish"):
        model(_ids(1, 2), past_key_values=cache)
    cache.reset()
    model(_ids(1, 20), past_key_values=cache)


# --- generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_writes_the_same_text(tiny: Make, place: str | Path, more: Any) -> None:
    model, ids = tiny("v41"), _ids(2, 60)
    wish = {"max_new_tokens": 8, "do_sample": False, **more}
    expected = model.generate(ids, **wish)
    out = model.generate(ids, kv_offload=place, return_dict_in_generate=True, **wish)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values.offload == place
    assert out.past_key_values.offload_counts.kv_rows > 0


def test_generate_refuses_to_offload_what_it_does_not_make(tiny: Make) -> None:
    model, ids = tiny("v4"), _ids(1, 6)
    with pytest.raises(ValueError, match="got past_key_values"):
        model.generate(ids, kv_offload="cpu", past_key_values=Dsv4Cache(model.config))
    with pytest.raises(ValueError, match="got use_cache=False"):
        model.generate(ids, kv_offload="cpu", use_cache=False)
    with pytest.raises(ValueError, match="kv_offload and cache_implementation='static'"):
        model.generate(ids, kv_offload="cpu", cache_implementation="static", max_new_tokens=2)


def test_distinct_ids_are_counted_alike_both_ways() -> None:
    class Few(FarRows):
        def __init__(self, batch: int, length: int) -> None:
            self.length, self._device = length, torch.device("cpu")

    for shape, length in (((2, 3, 50), 40), ((2, 1, 4), 1000), ((1, 1, 8), 64), ((1, 1, 8), 65)):
        ids = torch.randint(-1, length, shape)
        distinct, place = Few(shape[0], length)._distinct(ids)
        flat = (ids.clamp(min=0) + torch.arange(shape[0])[:, None, None] * length).flatten()
        assert np.array_equal(distinct, np.unique(flat.numpy()))
        assert np.array_equal(distinct[place.numpy()], flat.numpy())
