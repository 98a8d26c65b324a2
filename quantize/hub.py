# SPDX-License-Identifier: Apache-2.0
"""A source on the Hub: shards come one after the other, are checked, converted, and dropped.

Only the headers of all shards are fetched at first, so that the whole conversion is planned before
a byte of a weight is there. A download that was cut off goes on where it stopped, in a later run as
well; every file must have the checksum that the repository says. One commit serves all runs.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    httpx,
)

from modeling_dsv4.safetensors_file import parse_header

from .checksums import write_text
from .origin import Header, keep, read_kept

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = (".json", ".txt", ".jinja", ".model")
_LARGEST_HEADER = 1 << 27
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """A file as its repository describes it: size, SHA-256 (large files) or git's blob id."""

    size: int
    sha256: str | None
    blob: str | None


def is_repository(source: str | Path) -> bool:
    """Whether a source is no path here but may be OWNER/NAME on the Hub."""
    return not Path(source).exists() and _REPOSITORY.fullmatch(str(source)) is not None


class HubOrigin:
    """A repository of the Hub, or of what `HF_ENDPOINT` names.

    Args:
        repository: OWNER/NAME.
        staging: directory for small files and for the shards that are needed just now.

    Raises:
        ValueError: no such repository, no network, a file that is not what the repository says.
    """

    def __init__(self, repository: str, staging: Path) -> None:
        self.name = repository
        self.directory = staging / "repository"
        self.keeps, self.fetched = False, True
        self._described = staging / "repository.json"
        with _errors_explained(repository):
            self.commit, self._remote = self._describe()
            for name in self._remote:
                if name.endswith(_SMALL):
                    self._download(name)
            kept = read_kept(staging)
            if kept is None:
                headers = {shard: self._header(shard) for shard in self._shards()}
                kept = headers, {shard: self._remote[shard].size for shard in headers}, {}
                keep(staging, *kept)
            self.headers, self.sizes, _ = kept

    @property
    def identity(self) -> dict[str, Any]:
        """What the conversion says of its source."""
        return {"repository": self.name, "commit": self.commit}

    def prepare(self) -> None:
        """Nothing is left to do: what is needed was fetched when this was made."""

    def fetch(self, shard: str) -> Path:
        """Return a shard's file, downloaded and checked."""
        if not self.holds(shard):
            with _errors_explained(self.name):
                self._download(shard)
        return self.directory / shard

    def holds(self, shard: str) -> bool:
        """Whether a shard is on this disk, whole."""
        return (self.directory / shard).is_file()

    def release(self, shard: str) -> None:
        """Drop a shard; the Hub has it still."""
        (self.directory / shard).unlink(missing_ok=True)

    def _describe(self) -> tuple[str, dict[str, RemoteFile]]:
        """The commit and its files: of an earlier run if there was one, else the newest."""
        if self._described.is_file():
            data = json.loads(self._described.read_text(encoding="utf-8"))
            return data["commit"], {n: RemoteFile(**f) for n, f in data["files"].items()}
        info = huggingface_hub.HfApi().model_info(self.name, files_metadata=True)
        found = {
            f.rfilename: RemoteFile(f.size, f.lfs and f.lfs.sha256, f.blob_id)
            for f in info.siblings or ()
            if "/" not in f.rfilename and f.rfilename.endswith((*_SMALL, ".safetensors"))
        }
        if "config.json" not in found:
            raise ValueError(f"{self.name}: wanted a repository with config.json, found none")
        self.directory.mkdir(parents=True, exist_ok=True)
        data = {"commit": info.sha, "files": {name: asdict(file) for name, file in found.items()}}
        write_text(self._described, json.dumps(data))
        return str(info.sha), found

    def _shards(self) -> list[str]:
        """Shards that the index names; without one, all there are."""
        there = [name for name in self._remote if name.endswith(".safetensors")]
        index = self.directory / "model.safetensors.index.json"
        if not index.is_file():
            return sorted(there)
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(named - set(there)):
            raise ValueError(f"{self.name}: its index names {missing[0]}, which is not there")
        return sorted(named)

    def _url(self, name: str) -> str:
        return huggingface_hub.hf_hub_url(self.name, name, revision=self.commit)

    def _header(self, shard: str) -> Header:
        """Read the first bytes of a shard, and leave the rest where it is."""
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        wanted, raw = 8, b""
        with http_stream_backoff(
            "GET", self._url(shard), headers=headers, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            for piece in response.iter_bytes():
                raw += piece
                if wanted == 8 and len(raw) >= 8:
                    wanted = 8 + int.from_bytes(raw[:8], "little")
                if len(raw) >= wanted > 8 or wanted > _LARGEST_HEADER:
                    break
        if not 8 < wanted <= min(len(raw), _LARGEST_HEADER):
            raise ValueError(f"{self.name}: {shard} is no safetensors file")
        return parse_header(Path(shard), raw[8:wanted], self._remote[shard].size)

    def _download(self, name: str) -> None:
        """Fetch a file beside its name and rename it when it is right; once more if it is not."""
        path, remote = self.directory / name, self._remote[name]
        if path.is_file():
            return
        beside = path.with_name(name + ".part")
        for _ in range(2):
            with beside.open("ab") as file:
                if file.tell() < remote.size:
                    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
                    http_get(
                        self._url(name), file, resume_size=file.tell(), headers=headers,
                        expected_size=remote.size, tqdm_class=_Silent,
                    )  # fmt: skip
            if _is_right(beside, remote):
                beside.replace(path)
                return
            beside.unlink()
        raise ValueError(
            f"{self.name}: {name} came twice with another checksum than the repository says; try "
            "again later, or tell its owners"
        )


class _Silent(huggingface_hub.utils.tqdm):
    """The conversion has a bar of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def _is_right(path: Path, remote: RemoteFile) -> bool:
    if path.stat().st_size != remote.size:
        return False
    wanted, digest = remote.sha256, hashlib.sha256()
    if wanted is None:
        wanted, digest = remote.blob, hashlib.sha1(b"blob %d\0" % remote.size)
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest() == wanted


@contextmanager
def _errors_explained(repository: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repository}: no directory, and no repository's name") from error
    except (httpx.HTTPError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"{repository}: no directory here, and not to be had from the Hub "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}); run the same "
            "command again to continue"
        ) from error
