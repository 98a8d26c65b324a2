# SPDX-License-Identifier: Apache-2.0
"""The study's instruments for memory, routing and drafting measure what they say."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

from nano.data import Corpus, Domain  # noqa: E402
from study import derive, drafting, memory, ngrams, routing, tables, training  # noqa: E402
from study.ngrams import FREQUENT, RARE, UNSEEN  # noqa: E402
from study.variant import Variant  # noqa: E402

from modeling_dsv4 import Dsv4ForCausalLM  # noqa: E402
from modeling_dsv4.engram import Engram  # noqa: E402


@pytest.fixture(scope="module")
def texts() -> Corpus:
    """The nano's tokens; random ones for text."""
    tokenizer = Tokenizer.from_file(str(ROOT / "models/nano-v41/tokenizer.json"))
    rng = np.random.default_rng(0)
    train, rows = rng.integers(5, 400, 9000), rng.integers(5, 400, (3, 64))
    domain = Domain(train.astype(np.uint16), rows.astype(np.uint16), 0)
    return Corpus(tokenizer, {"prose": domain, "code": domain})


def small(name: str) -> Variant:
    """A variant that is trained on few tokens a step."""
    variant = Variant.read(name)
    return replace(variant, recipe={**variant.recipe, "rows": 2, "length": 64})


@pytest.fixture
def speaking(texts: Corpus) -> Dsv4ForCausalLM:
    """A model with Engram whose memory and experts say something."""
    model = Variant.read("memory-engram").build(texts, 0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.engram is not None:
                layer.engram.kv_proj.weight.normal_(std=0.2)
            layer.mlp.shared_experts.down_proj.weight.normal_(std=0.1)
        model.lm_head.weight.normal_(std=0.1)
    return model


def test_experts_make_up_for_the_parameters_of_memory(texts: Corpus) -> None:
    models = {
        name: Variant.read(f"memory-{name}").build(texts, 0)
        for name in ("none", "engram", "experts", "shuffled")
    }
    size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    active = {name: memory.active_parameters(model) for name, model in models.items()}
    assert size["shuffled"] == size["engram"] > 2 * size["none"]
    assert 0 <= size["experts"] / size["engram"] - 1 < 0.02
    assert 0 <= active["experts"] / active["engram"] - 1 < 0.03
    config = models["none"].config
    # A third expert of each layer, and a line of its router for every expert more.
    more = 4 * (3 * 128 * 64 + (35 - config.n_routed_experts) * 128)
    assert active["experts"] - active["none"] == more
    # The projection of four rows to four keys and a value, two norms, and the rows.
    assert active["engram"] - active["none"] == 4 * 32 * 5 * 128 + 2 * 4 * 128 + 4 * 32


def test_shuffled_ids_say_nothing_and_knocked_out_memory_is_silent(
    texts: Corpus, speaking: Dsv4ForCausalLM
) -> None:
    ids = torch.arange(5, 45)[None]
    shuffled = Variant.read("memory-shuffled").build(texts, 0).eval()
    shuffled.load_state_dict(speaking.state_dict())
    with torch.no_grad():
        first, second = (speaking(ids).logits for _ in range(2))
        assert torch.equal(first, second)
        one, other = (shuffled(ids).logits for _ in range(2))
        assert not torch.equal(one, other)
        out = []
        for model in (speaking, shuffled):
            with memory.without_memory(model):
                out.append(model(ids).logits)
        assert torch.equal(*out)
        assert not torch.equal(out[0], first)


def test_a_table_from_disk_gives_the_identical_loss(
    texts: Corpus, speaking: Dsv4ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts.domains["prose"].held_out
    plain = {n: m.embed for n, m in speaking.named_modules() if isinstance(m, Engram)}
    found = memory._from_disk(speaking, rows)
    assert found["largest_difference"] == 0
    assert found["loss"] == found["loss_in_memory"] > 0
    # Each row is 128 bytes; most rows were looked up for the first time.
    assert found["bytes_read"] >= 128 * found["reads"] > 128 * 100
    assert all(speaking.get_submodule(n).embed is m for n, m in plain.items())
    write = memory._write
    monkeypatch.setattr(memory, "_write", lambda t, w, f: write(t, w.bfloat16().float(), f))
    assert memory._from_disk(speaking, rows)["largest_difference"] > 0


def test_trigrams_are_told_apart() -> None:
    read = np.array([[1, 2, 3] * 5, [7, 8, 9] * 5], dtype=np.uint16)
    rows = np.array([[1, 2, 3, 7, 8, 9], [3, 1, 2, 3, 1, 2]], dtype=np.uint16)
    assert ngrams.trigram_kinds(read, rows, often=5).tolist() == [
        [UNSEEN, FREQUENT, UNSEEN, UNSEEN, FREQUENT],
        [UNSEEN, RARE, FREQUENT, RARE, RARE],
    ]
    # Nothing was read across the end of a row.
    assert ngrams.trigram_kinds(read, np.array([[2, 3, 7]])).tolist() == [[UNSEEN, UNSEEN]]


@pytest.mark.parametrize(
    ("domain", "text", "want"),
    [
        ("prose", "Today we speak of the Federal Reserve Board in peace.", " Reserve Board"),
        ("prose", "in the past. United States forces, New York", " York"),
        ("prose", "The Union of old is New", ""),
        ("code", "rest = dup_remainder(f)  # the remainder", "up_remainder"),
        ("code", "class MatrixSymbol: pass", "atrixSymbol"),
        ("code", "for remainder in polynomials", ""),
    ],
)
def test_names_are_found(texts: Corpus, domain: str, text: str, want: str) -> None:
    ids = np.array([texts.tokenizer.encode(text).ids])
    ends = ngrams.ends_name(texts.tokenizer, ids, domain)[0]
    spelled = "".join(texts.tokenizer.decode([i]) for i in ids[0, 1:][ends])
    # Tokens end where they like: the first letters may belong to one that does not count.
    assert want.endswith(spelled)
    assert bool(spelled) == bool(want)


def test_loads_are_described() -> None:
    even, one = torch.tensor([5, 5, 5, 5]), torch.tensor([0, 20, 0, 0])
    assert routing.spread([even]) == {"busiest": 1.0, "entropy": 1.0, "idle": 0.0}
    assert routing.spread([even, one]) == {"busiest": 4.0, "entropy": 0.5, "idle": 3.0}
    found = routing.describe({"prose": [even, one], "code": [even, 10 * even]})
    # 70 and 50 of 220 choices each, and nobody is left without.
    assert found["dead"] == 0
    assert found["busiest"] == pytest.approx(70 / 55)
    assert routing.describe({"prose": [even, one]})["dead"] == 3


def test_the_balancing_loss_is_least_where_loads_are_equal() -> None:
    tokens = torch.arange(64)
    even, one = torch.zeros(2, 64, 8)
    even[tokens, tokens % 8] = even[tokens, (tokens + 1) % 8] = 5
    one[:, :2], one[:, 2:] = 5, -9
    assert routing.balance_loss((even,), 2).item() == pytest.approx(1)
    # Two experts have all choices, and all but a little of the scores.
    assert 3.9 < routing.balance_loss((one,), 2).item() < 4
    torch.manual_seed(0)
    x, weight = torch.randn(512, 16) + 0.5, (0.3 * torch.randn(8, 16)).requires_grad_()

    def spread() -> float:
        chosen = (x @ weight.T).topk(2).indices.flatten()
        return routing.spread([torch.bincount(chosen, minlength=8)])["entropy"]

    assert spread() < 0.96
    for _ in range(60):
        logits = x @ weight.T
        loss = routing.balance_loss((logits, logits), 2)
        weight.data -= 0.5 * torch.autograd.grad(loss, weight)[0]
    assert loss.item() == pytest.approx(2, abs=0.01)
    assert spread() > 0.99


def test_every_token_is_counted_in_every_layer(texts: Corpus, speaking: Dsv4ForCausalLM) -> None:
    rows = texts.domains["prose"].held_out
    with routing.counted(speaking) as counts:
        memory.token_losses(speaking, rows)
    assert [int(c.sum()) for c in counts] == [rows.size * 2] * 4
    speaking(torch.arange(5, 25)[None])
    assert [int(c.sum()) for c in counts] == [rows.size * 2] * 4


def test_only_the_bias_moves_without_a_loss(texts: Corpus) -> None:
    moved, losses = {}, {}
    for name in ("memory-none", "routing-none", "routing-loss"):
        variant = small(name)
        model = variant.build(texts, 0).train()
        lines = list(training._train(model, texts, variant.recipe_for(0), 2))
        gates = [layer.mlp.gate for layer in model.model.layers]
        moved[name] = any(bool(g.e_score_correction_bias.any()) for g in gates)
        losses[name] = [line["loss"] for line in lines]
    assert Variant.read("routing-none").config == Variant.read("memory-none").config
    assert moved == {"memory-none": True, "routing-none": False, "routing-loss": False}
    # What is reported is the language model's loss alone, the sum less the other.
    assert losses["routing-loss"][0] == pytest.approx(losses["routing-none"][0], abs=1e-5)


def test_acceptance_is_counted_by_place() -> None:
    runs = [{"made": [10, 10], "right": [8, 2]}, {"made": [10], "right": [7]}]
    assert drafting.by_place(runs) == (pytest.approx([0.75, 0.2 / 0.75]), 1.95)
    assert drafting.by_place(runs[:1]) == (pytest.approx([0.8, 0.25]), 2.0)


def test_drafted_text_is_the_backbones_with_and_without_the_markov_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafting, "NEW", 8)
    model = Dsv4ForCausalLM.from_pretrained(ROOT / "models/nano-v41", dtype=torch.float32).eval()
    ids = torch.arange(300, 340).view(2, 20)
    plain, nothing = drafting.decode(model, ids, None, sample=False)
    text, whole = drafting.decode(model, ids, 5, sample=False)
    with drafting.without_markov(model):
        other, parted = drafting.decode(model, ids, 5, sample=False)
    again, repeated = drafting.decode(model, ids, 5, sample=False)
    assert not nothing
    assert all(torch.equal(plain, t) for t in (text, other, again))
    assert whole == repeated != parted


def test_differences_are_of_one_seed() -> None:
    a = [{"seed": 2, "x": 5.0}, {"seed": 0, "x": 1.0}, {"seed": 7, "x": 9.0}]
    b = [{"seed": 0, "x": 2.0}, {"seed": 1, "x": 0.0}, {"seed": 2, "x": 6.5}]
    pairs = [(x["x"], y["x"]) for x, y in tables.paired(a, b)]
    assert pairs == [(5.0, 6.5), (1.0, 2.0)]
    # The mean of -1.5 and -1, and 12.706 times 0.25.
    assert tables.difference(pairs) == "-1.250 ± 3.176"
    assert tables.difference(pairs[:1]) == "-1.500 (one seed)"
    assert tables.difference([]) == "not run"


def test_tables_and_plots_follow_from_the_logs_of_runs(
    texts: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "held_out", lambda c: {n: d.held_out for n, d in c.domains.items()})
    monkeypatch.setattr(tables, "LATE", 1)
    for name in ("memory-none", "memory-engram", "routing-loss"):
        training.run(small(name), texts, 0, tmp_path, steps=2)
    found = derive.read_logs(tmp_path)
    groups = {v.name: v for v in Variant.all()}
    lines = tables.memory_table(found, [v for n, v in groups.items() if n.startswith("memory")])
    none, engram = (found[f"memory-{n}"][0]["prose"]["loss"] for n in ("none", "engram"))
    told = next(line for line in lines if line.startswith("| Engram - no Engram | prose"))
    assert f"| {engram - none:+.3f} (one seed) |" in told
    assert any(line.startswith("| Engram, knocked out - not | code") for line in lines)
    assert any(line.startswith("| 0 | prose |") and "| 0 |" in line for line in lines)
    (loss,) = (v for n, v in groups.items() if n == "routing-loss")
    balance = tables.routing_table(found, [loss])
    bias, other = (found[n][0]["lines"][1]["loss"] for n in ("memory-none", "routing-loss"))
    told = next(line for line in balance if line.startswith("| a loss of 0.01 (Switch) |"))
    assert f"| {other - bias:+.3f} (one seed) |" in told
    assert any(line.startswith("| bias (V4) |") for line in balance)
