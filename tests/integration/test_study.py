# SPDX-License-Identifier: Apache-2.0
"""The study: its instruments measure what they say, and its document says what its logs say."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

from nano.data import Corpus  # noqa: E402
from study import derive, residual, tables  # noqa: E402
from study.variant import LOGS, Variant  # noqa: E402

from modeling_dsv4.hyper_connection import HyperConnection  # noqa: E402


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The nano's tokens; no text is read."""
    return Corpus(Tokenizer.from_file(str(ROOT / "models/nano-v41/tokenizer.json")), {})


def test_gains_of_known_products() -> None:
    double = [2 * torch.eye(4).expand(3, 4, 4)] * 5
    forward, backward = residual.gains(double)
    assert forward == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert backward == forward[::-1]
    # One stream that feeds all: rows of the mapping sum to 1, its one full column to 4.
    comb = torch.zeros(1, 4, 4)
    comb[:, 0, :] = 1
    forward, backward = residual.gains([comb])
    assert (forward, backward) == ([1.0], [4.0])


def test_each_kind_of_connection_stands_at_every_site(corpus: Corpus) -> None:
    found, logits = {}, {}
    ids = torch.arange(5, 25)[None]
    for variant in (v for v in Variant.all() if v.group == "residual"):
        model = variant.build(corpus, 0).eval()
        found[variant.name] = sum(isinstance(m, HyperConnection) for m in model.modules())
        with residual.recorded(model) as combs, torch.no_grad():
            logits[variant.name] = model(ids).logits
        assert len(combs) == 2 * model.config.num_hidden_layers
        forward, _ = residual.gains(combs)
        assert 0.9 < max(forward) < 1.2, variant.name
    sites = 2 * 48
    assert found == {
        "residual-plain": 0, "residual-hc": 0,
        "residual-mhc-two-pass": sites, "residual-mhc-single-pass": sites,
    }  # fmt: skip


def test_free_connections_can_gain_without_bound(corpus: Corpus) -> None:
    model = Variant.read("residual-hc").build(corpus, 0).eval()
    for module in model.modules():
        if isinstance(module, residual.FreeConnection):
            module.base.data[8:] *= 1.1
    with residual.recorded(model) as combs, torch.no_grad():
        model(torch.arange(5, 25)[None])
    assert max(residual.gains(combs)[0]) > 1000


def test_an_interval_covers_three_seeds() -> None:
    assert tables.interval([1.0, 2.0, 3.0]) == "2 ± 2.5"
    assert tables.interval([1.5]) == "1.5 (one seed)"
    assert tables.interval([]) == "not run"


def test_the_document_says_what_the_logs_say(tmp_path: Path) -> None:
    derive.derive(LOGS, ROOT / "docs", check=True)
    logs = Path(shutil.copytree(LOGS, tmp_path / "logs"))
    path = next(logs.glob("residual-*.json"))
    data = json.loads(path.read_text())
    data["prose"]["loss"] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="its tables are not what the logs say"):
        derive.derive(logs, ROOT / "docs", check=True)
