# SPDX-License-Identifier: Apache-2.0
"""A cache on disk: it continues bit for bit, and nothing but its own model's cache is read."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_dsv4 import Dsv4Cache, Dsv4Config, cache_files

KINDS = ["v4", "v41"]
Make = Callable[..., Any]


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


@torch.no_grad()
def _read(model: Any, cache: Dsv4Cache, length: int = 40) -> torch.Tensor:
    """Let a cache read three texts of unequal length, padded on the left."""
    ids, mask = _ids(3, length), torch.ones(3, length, dtype=torch.long)
    mask[1, :9], mask[2, : length - 2] = 0, 0
    model(ids, attention_mask=mask, past_key_values=cache)
    return ids


@pytest.fixture(scope="module")
def model(tiny: Make) -> Any:
    return tiny("v41")


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """The file of a cache that has read ten tokens."""
    cache, path = Dsv4Cache(model.config), tmp_path / "prompt.safetensors"
    with torch.no_grad():
        model(torch.arange(3, 13)[None], past_key_values=cache)
    cache.save(path, torch.arange(3, 13)[None])
    return path


# --- what continues -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_a_restored_cache_continues_bit_for_bit(
    tiny: Make, tmp_path: Path, kind: str, storage: str, dtype: torch.dtype
) -> None:
    model = tiny(kind, dtype)
    cache = Dsv4Cache(model.config, 20, storage)
    _read(model, cache)
    for token in _ids(3, 3).split(1, dim=1):
        model(token, past_key_values=cache)
    cache.save(tmp_path / "cache")
    restored = Dsv4Cache.load(tmp_path / "cache", model.config)
    assert (restored.storage, restored.max_rewind) == (storage, 20)
    assert restored.get_seq_length() == 43 and restored.rewindable == cache.rewindable
    for size, back in ((1, 0), (9, 4), (1, 5), (30, 20), (2, 0)):
        ids = _ids(3, size)
        found, expected = (model(ids, past_key_values=c).logits for c in (restored, cache))
        assert torch.equal(found, expected)
        for c in (restored, cache):
            c.crop(-back)
    for c in (restored, cache):
        c.batch_select_indices(torch.tensor([2, 0]))
    ids = _ids(2, 3)
    found, expected = (model(ids, past_key_values=c).logits for c in (restored, cache))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_restored_cache_is_independent_of_its_file(model: Any, saved: Path) -> None:
    first, second = (Dsv4Cache.load(saved, model.config) for _ in range(2))
    ids = _ids(1, 5)
    expected = model(ids, past_key_values=first).logits
    with saved.open("r+b") as file:
        file.write(b"\0" * saved.stat().st_size)
    assert torch.equal(model(ids, past_key_values=second).logits, expected)


def test_room_to_grow_is_not_written(model: Any, tmp_path: Path) -> None:
    cache = Dsv4Cache(model.config)
    with torch.no_grad():
        for part in _ids(1, 70).split([10, 30, 30], dim=1):
            model(part, past_key_values=cache)
    cache.save(tmp_path / "cache")
    held = load_file(tmp_path / "cache")
    assert held["layers.3.entries"].shape[1] == 70
    assert cache.layers[3].entries.data.shape[1] > 70
    assert sum(x.nbytes for x in held.values()) < cache.memory_bytes()


@pytest.mark.parametrize("storage", ["plain", "packed"])
@torch.no_grad()
def test_a_static_cache_is_written_without_its_room_and_goes_on_growing(
    model: Any, tmp_path: Path, storage: str
) -> None:
    sizes, ids = [], _ids(1, 60)
    caches = [Dsv4Cache(model.config, 20, storage, most) for most in (None, 5000)]
    for i, cache in enumerate(caches):
        for part in ids.split([40, *[1] * 20], dim=1):
            model(part, past_key_values=cache)
        cache.crop(-3)
        cache.save(tmp_path / f"{i}")
        sizes.append((tmp_path / f"{i}").stat().st_size)
    assert sizes[1] <= sizes[0] * 1.1
    loaded = Dsv4Cache.load(tmp_path / "1", model.config)
    more = _ids(1, 9)
    expected = model(more, past_key_values=caches[1]).logits
    assert torch.equal(model(more, past_key_values=loaded).logits, expected)
    assert not loaded.is_static


@torch.no_grad()
def test_a_model_of_another_dtype_refuses_the_cache(tiny: Make, saved: Path) -> None:
    half = tiny("v41", torch.bfloat16)
    with pytest.raises(ValueError, match="float32, the model computes in torch"):
        half(_ids(1, 3), past_key_values=Dsv4Cache.load(saved, half.config))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, cache = saved.read_bytes(), Dsv4Cache.load(saved, model.config)

    def fail(path: Path, *args: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(cache_files, "write_file", fail)
    with pytest.raises(OSError, match="no space"):
        cache.save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_only_a_finished_cache_is_saved(model: Any, tmp_path: Path) -> None:
    cache = Dsv4Cache(model.config)
    with pytest.raises(ValueError, match="wanted a cache whose last pass has finished"):
        cache.save(tmp_path / "cache")
    _read(model, cache)
    cache.open()
    with pytest.raises(ValueError, match="wanted a cache whose last pass has finished"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


# --- whose cache it is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("index_topk", 5), ("sliding_window", 9), ("yarn", None), ("hc_eps", 1e-5)],
)
def test_another_configuration_is_refused_by_the_field_that_differs(
    tiny_config: Make, saved: Path, field: str, value: Any
) -> None:
    other = tiny_config("v41", **{field: value})
    with pytest.raises(ValueError, match=f"another configuration: {field} is .* and {value} here"):
        Dsv4Cache.load(saved, other)


def test_fields_that_change_no_cache_may_differ(tiny_config: Make, saved: Path) -> None:
    more = {"use_cache": False, "max_position_embeddings": 99, "eos_token_id": 5}
    cache = Dsv4Cache.load(saved, tiny_config("v41", **more))
    assert cache.get_seq_length() == 10


def test_every_ignored_field_is_one_of_the_configuration() -> None:
    assert set(Dsv4Config.__annotations__) > cache_files._IGNORED


def test_a_cache_knows_the_ids_that_it_has_read(model: Any, saved: Path) -> None:
    ids = torch.arange(3, 20)[None]
    assert Dsv4Cache.load(saved, model.config, ids).get_seq_length() == 10
    assert Dsv4Cache.load(saved, model.config, ids[:, :10].int()).get_seq_length() == 10
    other = ids.clone()
    other[0, 9] += 1
    with pytest.raises(ValueError, match="got that of other 10 tokens"):
        Dsv4Cache.load(saved, model.config, other)
    for wrong in (ids[:, :9], ids.repeat(2, 1)):
        with pytest.raises(ValueError, match=r"wanted \[1, 10\] or more columns"):
            Dsv4Cache.load(saved, model.config, wrong)
    Dsv4Cache.load(saved, model.config).save(saved)
    with pytest.raises(ValueError, match="saved without them"):
        Dsv4Cache.load(saved, model.config, ids)


# --- broken and foreign files -------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_a_truncated_file_is_refused(model: Any, saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        Dsv4Cache.load(saved, model.config)


def _rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file({name: x.clone() for name, x in tensors.items()}, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("kind"), "wanted a file of Dsv4Cache.save"),
        (lambda t, m: m.update(version="2"), "wanted version 1 of cache files, got '2'"),
        (lambda t, m: m.update(facts="no"), "wanted config and facts as JSON"),
        (lambda t, m: m.pop("config"), "wanted config and facts as JSON"),
        (lambda t, m: m.update(facts="{}"), "wanted all parts of a cache, got none of"),
        (lambda t, m: t.pop("state.seen"), "got none of 'state.seen'"),
        (lambda t, m: t.pop("layers.2.window"), "got none of 'layers.2.window'"),
        (lambda t, m: t.update(more=t["state.seen"]), r"unknown tensors \['more'\]"),
        (
            lambda t, m: t.update({"layers.1.entries": t["layers.1.entries"].repeat(2, 1, 1)}),
            r"got batches of \[1, 2\] rows",
        ),
        (
            lambda t, m: t.update({"layers.0.window": t["layers.0.window"][:, 1:]}),
            "wanted 71 slots of a ring",
        ),
    ],
)
def test_a_foreign_file_is_refused(
    model: Any, saved: Path, change: Callable[..., None], message: str
) -> None:
    _rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        Dsv4Cache.load(saved, model.config)


def test_a_models_weights_are_no_cache(model: Any, golden_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted a file of Dsv4Cache\.save, got other"):
        Dsv4Cache.load(golden_dir / "engram_real.safetensors", model.config)


def test_a_copy_of_a_cache_can_be_saved(model: Any, saved: Path) -> None:
    # Programs copy a prompt's cache for each question.
    first = copy.deepcopy(Dsv4Cache.load(saved, model.config))
    first.save(saved)
    assert Dsv4Cache.load(saved, model.config).get_seq_length() == 10
