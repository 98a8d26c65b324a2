# SPDX-License-Identifier: Apache-2.0
"""Conversions killed at random instants, and converted models with random bytes flipped.

The ordinary suite does a few of each; many, and how many, are
`pytest -m slow tests/integration/test_survival.py --log-cli-level=INFO`.
"""

import logging
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from modeling_dsv4 import Dsv4Config
from modeling_dsv4.safetensors_file import read_header
from quantize.checksums import Checksums, damages
from quantize.config import Recipe, get_recipe
from quantize.convert import Options, convert
from quantize.pack import PackFile
from quantize.tables import TableFile, blocks

logger = logging.getLogger(__name__)
SHARD = 300_000
FP4 = get_recipe("fp4")
BLOCKS = Recipe("blocks", (("*.down_proj", "fp8_block32"), ("*.mlp.experts.*", "fp8_rows32")))
# Rounds embedding, head and Engram tables too, in parts that are written side by side.
DENSE = Recipe(
    "dense",
    (
        ("*.mlp.experts.*", "fp4"),
        ("*.engram.embed.weight", "fp4"),
        ("model.embed_tokens.weight", "fp8_rows32"),
        ("lm_head.weight", "int4"),
    ),
)
MANY = pytest.mark.slow
# All of the tiny files' bytes that can go past the page cache do, as those of large ones.
WORK = """
import quantize.direct
from quantize.convert import convert
quantize.direct.LEAST = 1
convert(*arguments)
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


@pytest.fixture(params=["v4_a_fp8", "v41_b_fp8"])
def release(golden_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An official checkpoint with a tokenizer's file, V4 or V4.1 with Engram tables."""
    directory = Path(shutil.copytree(golden_dir / request.param, tmp_path / "release"))
    config = Dsv4Config.from_pretrained(directory)
    # V4.1's Engram is keyed by what words mean, whatever their case: as many as it wants.
    size, kinds = config.vocab_size, config.engram_compressed_vocab_size or config.vocab_size
    words = {f"{'Ww'[i < kinds]}{i % kinds}": i for i in range(size)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))
    return directory


class Killer:
    """Runs conversions in processes of their own, and kills them."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["quantize.convert"])
        self.kills = 0

    def run(self, seconds: float | None, *arguments: object) -> bool:
        """Convert; with `seconds`, SIGKILL after so long. Returns whether it ended by itself."""
        process = self.context.Process(target=exec, args=(WORK, {"arguments": arguments}))
        process.start()
        process.join(seconds)
        alive = process.is_alive()
        if alive:
            process.kill()
            process.join()
            self.kills += 1
        assert alive or process.exitcode == 0, "the conversion failed by itself"
        return not alive


@pytest.mark.parametrize("wanted", [4, pytest.param(60, marks=MANY)])
def test_kills_at_random_instants_change_no_byte(
    release: Path, tmp_path: Path, wanted: int
) -> None:
    killer, dice = Killer(), random.Random(wanted)
    whole, seconds = {}, {}
    # The first process waits for the imports of all.
    killer.run(None, release, tmp_path / "first", FP4, SHARD)
    for recipe in (DENSE, BLOCKS):
        start = time.perf_counter()
        killer.run(None, release, tmp_path / recipe.name, recipe, SHARD)
        seconds[recipe.name] = time.perf_counter() - start
        whole[recipe.name] = contents(tmp_path / recipe.name)
    rounds = 0
    while killer.kills < wanted:
        rounds += 1
        recipe, delete = (DENSE, BLOCKS)[rounds % 2], rounds % 4 > 1
        source = Path(shutil.copytree(release, tmp_path / f"source-{rounds}"))
        target, options = tmp_path / f"out-{rounds}", Options(delete_source_shards=delete)
        arguments = (source, target, recipe, SHARD, None, options)
        while not killer.run(dice.uniform(0, seconds[recipe.name]), *arguments):
            for name, raw in contents(target).items() if target.exists() else ():
                # What stands under a final name is whole; progress is kept elsewhere.
                if name in whole[recipe.name] and name != "checksums.json":
                    assert raw == whole[recipe.name][name], name
        assert contents(target) == whole[recipe.name]
        assert (source / "model.safetensors").exists() != delete
    logger.info("%d kills in %d conversions, all byte-identical", killer.kills, rounds)


@pytest.mark.parametrize("wanted", [30, pytest.param(600, marks=MANY)])
def test_every_flipped_byte_is_found(release: Path, tmp_path: Path, wanted: int) -> None:
    target = convert(release, tmp_path / "out", DENSE, SHARD)
    sums = Checksums.load(target)
    assert sums is not None
    paths = sorted(target.iterdir())
    assert {p.suffix for p in paths} == {".safetensors", ".json"}
    assert "tokenizer.json" in {p.name for p in paths}
    dice, flips = random.Random(wanted), 0
    while flips < wanted:
        for path in paths:
            whole = path.read_bytes()
            at, bits = dice.randrange(len(whole)), dice.randrange(1, 256)
            spoilt = bytearray(whole)
            spoilt[at] ^= bits
            path.write_bytes(spoilt)
            if path.name == "checksums.json":
                with pytest.raises(ValueError, match=r"checksums\.json: damaged or not readable"):
                    Checksums.load(target)
            else:
                (line,) = damages(target, sums)
                assert line == expected(path, whole, at), (path.name, at, bits)
            path.write_bytes(whole)
            flips += 1
    assert list(damages(target, sums)) == []
    logger.info("%d flips in %d files, all found and named", flips, len(paths))


def expected(path: Path, whole: bytes, at: int) -> str:
    """The line that names what byte `at` of a file belongs to."""
    if path.suffix != ".safetensors":
        return f"{path.name}: damaged"
    if at < 8 + int.from_bytes(whole[:8], "little"):
        return f"{path.name}: its header is damaged"
    path.write_bytes(whole)
    name = next(n for n, i in read_header(path).items() if i.start <= at < i.end)
    if path.name.startswith("engram-"):
        table = TableFile.open(path)
        row = (at - table.start) // table.layout.nbytes
        start, stop = next(b for b in blocks(table.num_rows) if b[0] <= row < b[1])
        return f"{path.name}: {table.name} is damaged in rows {start} to {stop - 1}"
    if not path.name.startswith("experts-"):
        return f"{path.name}: {name} is damaged"
    pack = PackFile.open(path)
    if name.endswith(".crc32"):
        expert = (at - pack.offset - pack.nbytes) // 8
    else:
        expert = next(e for e in range(pack.num_experts) if at < sum(pack.span(e)))
    return f"{path.name}: {pack.name}.{expert} is damaged"
