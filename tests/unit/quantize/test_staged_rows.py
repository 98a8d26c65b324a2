# SPDX-License-Identifier: Apache-2.0
"""Rows on their way to a GPU: each once, copied beside the work, waited for where they are used."""

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4.cpu.rows import Ids
from quantize import stored_table
from quantize.row_store import RowStore
from quantize.staged_rows import GpuLink, StagedRows
from quantize.stored_table import StoredTable
from quantize.tables import RowLayout, TableFile, table_header

GPU = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="uses the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
NAME = "model.layers.1.engram.embed"
ROWS, WIDTH = 90, 8


class SlowLink:
    """Copies that arrive when they are handed over, and not before; tells what happened."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.under_way: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.told.append("allocate")
        return torch.empty(nbytes, dtype=torch.uint8)

    def send(self, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
        self.told.append("send")
        target = torch.full_like(host, 77)
        self.under_way[len(self.told)] = host, target
        return target, len(self.told)

    def hand_over(self, rows: torch.Tensor, ticket: Any) -> None:
        self.told.append("hand over")
        self._arrive(ticket)

    def wait(self, ticket: Any) -> None:
        self.told.append("wait")
        self._arrive(ticket)

    def _arrive(self, ticket: int) -> None:
        if ticket in self.under_way:
            host, target = self.under_way.pop(ticket)
            target.copy_(host)


def _staged(link: Any, gathered: list[list[int]]) -> StagedRows:
    def gather(ids: torch.Tensor, out: torch.Tensor) -> None:
        gathered.append(ids.tolist())
        out.copy_(ids[:, None].expand(-1, 4))

    return StagedRows(link, 4, gather)


def test_a_row_is_gathered_once_and_copied_before_it_is_taken() -> None:
    link, gathered = SlowLink(), []
    staged = _staged(link, gathered)
    ids = torch.tensor([7, 3, 7, 7, 3, 9])
    staged.announce(ids)
    assert gathered == [[3, 7, 9]]
    assert link.told == ["allocate", "allocate", "send", "send"]
    assert staged.holds(ids) and not staged.holds(ids[1:])
    rows, place = staged.take()
    assert link.told[4:] == ["hand over"] * 2
    assert torch.equal(rows[place][:, 0].long(), ids)
    assert not staged.holds(ids)


def test_memory_is_written_again_only_when_its_copy_was_read() -> None:
    link, gathered = SlowLink(), []
    staged = _staged(link, gathered)
    first, second = torch.tensor([5, 6, 5]), torch.tensor([1, 2, 3])
    staged.announce(first)
    kept = staged.take()[0]
    staged.announce(second)
    # The same memory, larger for the new rows: its last copy is over.
    assert link.told[6:] == ["wait", "allocate", "wait", "send", "send"]
    assert kept[:, 0].tolist() == [5, 6]
    assert staged.take()[0][:, 0].tolist() == [1, 2, 3]


def test_of_many_that_are_told_at_once_only_the_last_counts() -> None:
    link, gathered = SlowLink(), []
    staged = _staged(link, gathered)
    for i in range(3):
        staged.announce(torch.tensor([i]))
    # The first was copied ahead; the others wait until one is taken.
    assert gathered == [[0]]
    rows, place = staged.take()
    assert rows[place, 0].tolist() == [2]
    assert gathered == [[0], [2]]


def test_no_ids_are_no_rows_and_copies_of_a_model_begin_anew() -> None:
    staged = _staged(SlowLink(), [])
    staged.announce(torch.zeros(0, dtype=torch.int64))
    assert [len(x) for x in staged.take()] == [0, 0]
    assert deepcopy({"a": staged}) == pickle.loads(pickle.dumps({"a": staged})) == {"a": None}


@pytest.fixture
def table_file(tmp_path: Path) -> TableFile:
    layout = RowLayout("F32", WIDTH)
    rows = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    path = tmp_path / "engram-layers-1.safetensors"
    path.write_bytes(table_header(NAME, layout, ROWS) + rows.numpy().tobytes())
    return TableFile.open(path)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_table_on_the_host_answers_where_its_layer_computes(
    table_file: TableFile, on_disk: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = SlowLink()
    if device == "cpu":
        monkeypatch.setattr(stored_table, "make_link", lambda device: device and link)
    table, there = StoredTable(NAME, ROWS, table_file.layout, torch.float32), torch.device(device)
    asked: list[list[int]] = []
    if on_disk:
        store = RowStore([table_file], 4000)
        table.attach_store(store, 0)
        take = store.take

        def watched(number: int, ids: Ids) -> Any:
            asked.append(ids.tolist())
            return take(number, ids)

        monkeypatch.setattr(store, "take", watched)
    else:
        table.attach_resident(table_file)
    assert table.reads_on_host(there)
    ids = torch.tensor([[4, 89, 4], [0, 0, 89]])
    expected = ids[..., None] * WIDTH + torch.arange(WIDTH)
    for _ in range(2):
        table.announce(ids, there)
        found = table(ids)
        assert found.device.type == device
        assert torch.equal(found.cpu(), expected.float())
    if on_disk:
        assert asked == [[0, 4, 89]] * 2
        # What was announced is what was taken.
        assert store.counts.engram_rows == 6
    # Others than those that were announced are looked up where they lie.
    table.announce(ids, there)
    assert torch.equal(table(ids[:1]), expected[:1].float())
    assert torch.equal(deepcopy(table)(ids) if not on_disk else table(ids).cpu(), expected.float())


def test_rows_are_used_where_they_lie_without_a_gpu(table_file: TableFile) -> None:
    table = StoredTable(NAME, ROWS, table_file.layout, torch.float32)
    table.attach_resident(table_file)
    assert not table.reads_on_host(torch.device("cpu"))
    assert not table.reads_on_host(torch.device("meta"))


@pytest.mark.gpu
def test_copies_run_beside_the_work_and_are_whole() -> None:
    device, memory = torch.device("cuda"), torch.randn(100_000, 66).view(torch.uint8)
    staged = StagedRows(
        GpuLink(device), 264, lambda ids, out: torch.index_select(memory, 0, ids, out=out)
    )
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        ids = torch.randint(0, 100_000, (30_000,))
        staged.announce(ids)
        for _ in range(3):
            busy = torch.tanh(busy @ busy)
        rows, place = staged.take()
        assert torch.equal(rows[place].cpu(), memory[ids])
