# SPDX-License-Identifier: Apache-2.0
"""A source on the Hub gives the bytes that a directory gives, and never lies here whole."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from quantize.choosing import Wish, settle
from quantize.config import Recipe, get_recipe
from quantize.convert import convert, open_source
from quantize.hub import HubOrigin, is_repository

FP4 = get_recipe("fp4")
REPOSITORY, COMMIT = "nobody/tiny", "c" * 40


class StandIn(ThreadingHTTPServer):
    """What of the Hub's HTTP interface a download needs, for one repository.

    Attributes:
        files: {name: bytes} that are served.
        cut: names whose next answers end early, {name: bytes}.
        spoilt: names whose next answers have a wrong byte.
        asked: (name, first byte) of every answer.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = files
        self.cut: dict[str, list[int]] = {}
        self.spoilt: dict[str, int] = {}
        self.asked: list[tuple[str, int]] = []


class _Answer(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [
                {"rfilename": name, "size": len(raw), "blobId": _blob(raw), **_lfs(name, raw)}
                for name, raw in self.server.files.items()
            ]
            answer = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(answer).encode())
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if name not in self.server.files:
            return self._send(404, b"")
        raw = self.server.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.server.asked.append((name, start))
        if self.server.spoilt.get(name):
            self.server.spoilt[name] -= 1
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
        status = 206 if "Range" in self.headers else 200
        rest = raw[start:]
        cut = self.server.cut.get(name)
        return self._send(status, rest, cut.pop(0) if cut else len(rest))

    def _send(self, status: int, raw: bytes, count: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[:count])
        if count is not None and count < len(raw):
            self.close_connection = True

    def handle(self) -> None:
        # Whoever has read a header hangs up.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def _blob(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def _lfs(name: str, raw: bytes) -> dict[str, object]:
    if not name.endswith(".safetensors"):
        return {}
    sums = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 1}
    return {"lfs": sums}


@pytest.fixture(scope="module")
def release(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official checkpoint in three shards; experts lie in two of them."""
    directory = tmp_path_factory.mktemp("release")
    tensors = load_file(golden_dir / "v4_a_fp8" / "model.safetensors")
    config = (golden_dir / "v4_a_fp8" / "config.json").read_text()
    (directory / "config.json").write_text(config)
    (directory / "tokenizer.json").write_text("{}")
    names, index = sorted(tensors), {}
    cuts = [0, *(names.index(f"layers.{i}.ffn.experts.1.w2.weight") for i in (0, 1)), len(names)]
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        some = names[cuts[i] : cuts[i + 1]]
        save_file({name: tensors[name] for name in some}, directory / file)
        index |= dict.fromkeys(some, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


@pytest.fixture
def hub(release: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    files = {path.name: path.read_bytes() for path in release.iterdir()}
    server = StandIn(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", endpoint, raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_a_repository_becomes_what_its_directory_becomes(
    hub: StandIn, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    download = HubOrigin._download

    def counted(self: HubOrigin, name: str) -> None:
        nonlocal most
        download(self, name)
        most = max(most, len(list(self.directory.glob("*.safetensors"))))

    monkeypatch.setattr(HubOrigin, "_download", counted)
    target = convert(REPOSITORY, tmp_path / "hub", FP4, max_shard_size=300_000)
    local = convert(release, tmp_path / "local", FP4, max_shard_size=300_000)
    assert weights(target) == weights(local)
    assert (target / "config.json").read_bytes() == (local / "config.json").read_bytes()
    assert {p.name for p in target.iterdir()} == {p.name for p in local.iterdir()}
    # An expert that begins in one shard and ends in the next needs both.
    assert most == 2
    asked = [name for name, _ in hub.asked if name.endswith(".safetensors")]
    # Once for the header, once for all of it.
    assert all(asked.count(name) == 2 for name in set(asked))
    before = len(hub.asked)
    assert convert(REPOSITORY, target, FP4, max_shard_size=300_000) == target
    assert len(hub.asked) == before


def test_a_dropped_connection_goes_on_where_it_stopped(
    hub: StandIn, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is kept of a cut answer are whole pieces.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    shard = "model-00002-of-00003.safetensors"
    size = len(hub.files[shard])
    hub.cut[shard] = [size, size // 2]
    target = convert(REPOSITORY, tmp_path / "hub", FP4)
    assert weights(target) == weights(convert(release, tmp_path / "local", FP4))
    starts = [start for name, start in hub.asked if name == shard]
    assert starts[:2] == [0, 0]
    assert 0 < starts[2] <= size // 2


def test_a_later_run_goes_on_with_a_download_and_its_commit(
    hub: StandIn, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = "model-00002-of-00003.safetensors"
    part = tmp_path / "hub" / ".source" / "repository" / f"{shard}.part"
    with monkeypatch.context() as patch:
        patch.setattr("quantize.hub.HubOrigin.fetch", _stop)
        with pytest.raises(KeyboardInterrupt):
            convert(REPOSITORY, tmp_path / "hub", FP4)
    part.write_bytes(hub.files[shard][:1000])
    convert(REPOSITORY, tmp_path / "hub", FP4)
    assert (shard, 1000) in hub.asked
    assert weights(tmp_path / "hub") == weights(convert(release, tmp_path / "local", FP4))
    assert json.loads((tmp_path / "hub" / "checksums.json").read_text())["job"]["commit"] == COMMIT


def test_formats_are_chosen_for_a_size_without_the_source_lying_here(
    hub: StandIn, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    download = HubOrigin._download

    def counted(self: HubOrigin, name: str) -> None:
        download(self, name)
        held.append(len(list(self.directory.glob("*.safetensors"))))

    monkeypatch.setattr(HubOrigin, "_download", counted)
    settled = {}
    for source, name in ((REPOSITORY, "hub"), (release, "local")):
        target, wish = tmp_path / name, Wish(bits=4.0)
        target.mkdir()
        opened = open_source(source, target, None, 10**6)
        assert opened is not None
        settled[name] = settle(wish, opened, target)
        convert(source, target, settled[name].recipe, 10**6, wish=wish.to_dict())
    assert settled["hub"].recipe == settled["local"].recipe
    assert settled["hub"].recipe.name == "mixed"
    assert weights(tmp_path / "hub") == weights(tmp_path / "local")
    assert max(held) < 3
    asked = [name for name, _ in hub.asked if name.endswith(".safetensors")]
    # For the header, to choose by, and to convert; a shard of two layers stays for the second.
    assert all(asked.count(name) <= 3 for name in set(asked))


def test_a_repository_is_no_model_to_calibrate_with(hub: StandIn, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    opened = open_source(REPOSITORY, tmp_path / "hub", None, 10**6)
    assert opened is not None
    with pytest.raises(ValueError, match="give that as --calibrate-model"):
        settle(Wish(calibrate=text), opened, tmp_path / "hub")


def test_a_finished_target_is_not_that_of_another_repository(hub: StandIn, tmp_path: Path) -> None:
    target = convert(REPOSITORY, tmp_path / "hub", FP4)
    before = len(hub.asked)
    other = Recipe("fp4", (("*.mlp.experts.*", "fp8_block32"),))
    for source, recipe, wish in (
        ("nobody/other", FP4, None), (REPOSITORY, other, None), (REPOSITORY, FP4, {"bits": 3.0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="another source or with other options"):
            convert(source, target, recipe, wish=wish)
    assert convert(REPOSITORY, target, FP4) == target
    assert len(hub.asked) == before


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("times", [1, 2])
def test_a_wrong_checksum_is_fetched_again_once(
    hub: StandIn, release: Path, tmp_path: Path, times: int
) -> None:
    shard = "model-00001-of-00003.safetensors"
    # The header comes first, and has no spoilt byte in it.
    hub.spoilt[shard] = 1 + times
    if times == 1:
        target = convert(REPOSITORY, tmp_path / "hub", FP4)
        assert weights(target) == weights(convert(release, tmp_path / "local", FP4))
        return
    with pytest.raises(ValueError, match=f"{shard} came twice with another checksum"):
        convert(REPOSITORY, tmp_path / "hub", FP4)
    assert not list((tmp_path / "hub").glob("*.safetensors"))
    convert(REPOSITORY, tmp_path / "hub", FP4)
    assert weights(tmp_path / "hub") == weights(convert(release, tmp_path / "local", FP4))


def test_a_repository_without_a_shard_of_its_index_is_refused(hub: StandIn, tmp_path: Path) -> None:
    del hub.files["model-00003-of-00003.safetensors"]
    with pytest.raises(ValueError, match=r"its index names model-00003-of-00003\.safetensors"):
        convert(REPOSITORY, tmp_path / "hub", FP4)


def test_an_unknown_repository_says_so(hub: StandIn, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nobody/other: no directory here, and not to be had"):
        convert("nobody/other", tmp_path / "hub", FP4)


def test_paths_that_exist_are_no_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_repository("a/b")
    assert is_repository("a/c")
    assert not is_repository("/a/c")
