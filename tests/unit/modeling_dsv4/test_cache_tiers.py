# SPDX-License-Identifier: Apache-2.0
"""Files of entries when something is odd: short writes, forks, full disks, names that are none."""

import copy
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache, cache_tiers
from modeling_dsv4.cache_offload import OffloadCounts
from modeling_dsv4.cache_storage import PlainCodec
from modeling_dsv4.cache_tiers import FileRows

Make = Callable[..., Any]
RATIOS = [0, 4, 128, 4]


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


def _store(folder: Path, x: torch.Tensor) -> FileRows:
    store = FileRows(PlainCodec(x.shape[2]), OffloadCounts(), folder)
    store.extend(x, None, torch.full((x.shape[0],), x.shape[1]))
    return store


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_cache_is_saved_and_copied_while_a_layer_has_no_entry_yet(
    tiny: Make, tmp_path: Path, batch: int
) -> None:
    model, ids, files = tiny("v4", compress_ratios=RATIOS), _ids(batch, 121), []
    for offload in (None, tmp_path / "kv"):
        cache = Dsv4Cache(model.config, offload=offload)
        model(ids[:, :100], past_key_values=cache)
        model(ids[:, 100:101], past_key_values=cache)
        copy.deepcopy(cache).save(tmp_path / "copy")
        cache.save(tmp_path / "cache")
        files.append((tmp_path / "cache").read_bytes())
        assert (tmp_path / "copy").read_bytes() == files[-1]
    assert files[0] == files[1]


def test_a_system_that_writes_and_reads_less_than_it_is_asked_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: write(f, bytes(data[:100]), at))
    monkeypatch.setattr(os, "pread", lambda f, size, at: read(f, min(size, 70), at))
    x = torch.randn(2, 30, 8)
    store = _store(tmp_path, x)
    assert torch.equal(copy.deepcopy(store).held(), x)
    store.select(torch.tensor([0, 0, 1]), in_place=False)
    assert torch.equal(store.held(), x[[0, 0, 1]])


def test_a_forked_process_does_not_write_over_its_parents_entries(tmp_path: Path) -> None:
    x = torch.randn(1, 30, 8)
    store = _store(tmp_path, x)
    child = os.fork()
    if not child:
        signal.alarm(20)
        said = 0
        for use in (lambda: store.append(x[:, :1].view(torch.uint8), *torch.tensor([[0], [1]])),
                    store.held, lambda: store.fetch_block(0, 1)):  # fmt: skip
            try:
                use()
            except ValueError as error:
                said += "belongs to the process that made it" in str(error)
        os._exit(said)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert torch.equal(store.held(), x)


@torch.no_grad()
def test_a_reordering_that_fails_leaves_a_cache_that_says_so(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("v4")
    cache = Dsv4Cache(model.config, offload=tmp_path)
    model(_ids(2, 20), past_key_values=cache)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 2]))
    assert cache.finished

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=f"{tmp_path}.*No space left.*make room"):
            cache.reorder_cache(torch.tensor([1, 1]))
    assert not cache.finished
    with pytest.raises(ValueError, match="pass or reordering"):
        model(_ids(2, 1), past_key_values=cache)
    cache.reset()
    model(_ids(2, 20), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.finished


def test_a_file_that_was_cut_short_is_an_error_of_the_disk(tmp_path: Path) -> None:
    store = _store(tmp_path, torch.randn(2, 30, 8))
    os.ftruncate(store.fileno(), 10)
    for use in (lambda: store.fetch_block(0, 30), lambda: copy.deepcopy(store)):
        with pytest.raises(OSError, match=f"{tmp_path}.*cut short"):
            use()


def test_pickling_is_refused_with_advice(tiny_config: Make, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cache\.save"):
        pickle.dumps(Dsv4Cache(tiny_config("v4"), offload=tmp_path))


def test_a_row_that_outgrows_its_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far enough apart for long rows, and near enough for many in the largest file of ext4.
    assert 4096 * cache_tiers._RUN_BYTES <= 1 << 44
    monkeypatch.setattr(cache_tiers, "_RUN_BYTES", 32 * 30)
    x = torch.randn(2, 30, 8)
    store = _store(tmp_path, x)
    with pytest.raises(ValueError, match="room for 30 entries of 32 bytes"):
        store.extend(x[:, :1], torch.tensor([30, 30]), torch.tensor([1, 1]))


@pytest.mark.parametrize("name", ["", "CPU", "cuda", "cuda:0", "disk", True, 3])
def test_what_is_no_directory_is_refused(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='wanted "cpu" or a directory'):
        Dsv4Cache(tiny_config("v4"), offload=name)
    assert not list(tmp_path.iterdir())


def test_directories_may_be_the_users_or_have_odd_names(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = Dsv4Cache(tiny_config("v4"), offload="~/kv")
    Dsv4Cache(tiny_config("v4"), offload="./disk")
    assert cache.offload == tmp_path / "kv"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "kv"]
