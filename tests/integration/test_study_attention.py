# SPDX-License-Identifier: Apache-2.0
"""The study of attention: facts are planted as promised, and recall is what a model recalls."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

from nano.data import Corpus, Domain  # noqa: E402
from study import context, context_tables, facts  # noqa: E402
from study.memory import active_parameters  # noqa: E402
from study.variant import Variant  # noqa: E402

VOCABULARY = 4096


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The nano's tokens; noise for a text."""
    rng = np.random.default_rng(0)
    text = rng.integers(5, 200, 70_000).astype(np.uint16)
    tokenizer = Tokenizer.from_file(str(ROOT / "models/nano-v41/tokenizer.json"))
    domain = Domain(text, text[:16_384].reshape(-1, 512), 1)
    return Corpus(tokenizer, {"prose": domain})


@pytest.fixture(scope="module")
def words(corpus: Corpus) -> facts.Words:
    return facts.Words.of(corpus.tokenizer)


def copies(window: int) -> Any:
    """A model that knows, of the last `window` tokens, what followed the token it stands on."""

    def model(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        row = input_ids[0].tolist()
        logits = torch.zeros(1, len(row), VOCABULARY)
        seen: dict[int, int] = {}
        for at, token in enumerate(row):
            before = seen.get(token)
            if before is not None and at - before <= window:
                logits[0, at, row[before + 1]] = 100.0
            seen[token] = at
        return SimpleNamespace(logits=logits)

    return model


def guesses(words: facts.Words) -> Any:
    """A model that knows the values of a kind, and which it was asked for, and no more."""

    def model(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        dice = torch.Generator().manual_seed(5)
        logits = torch.zeros(1, input_ids.shape[1], VOCABULARY)
        for kind, values in zip(words.kinds.tolist(), words.values, strict=True):
            for at in (input_ids[0] == kind).nonzero()[:, 0].tolist():
                logits[0, at, torch.from_numpy(values)] = 100 + 0.01 * torch.rand(
                    facts.VALUES, generator=dice
                )
        return SimpleNamespace(logits=logits)

    return model


def rows(count: int, size: int = 8192) -> np.ndarray:
    return np.random.default_rng(1).integers(5, 200, (count, size)).astype(np.uint16)


def test_who_copies_recalls_all_and_who_copies_near_recalls_near(words: facts.Words) -> None:
    found = facts.recall(copies(8192), rows(2), words, 0)
    for key in ("exact", "among", "probability"):
        assert found[key] == pytest.approx([1.0] * 6), key
    found = facts.recall(copies(512), rows(2), words, 0)
    assert found["exact"] == [1, 1, 1, 1, 0, 0]
    assert found["distances"] == [16, 32, 128, 512, 2048, 7168]


def test_who_guesses_has_the_chance_that_is_stated(words: facts.Words) -> None:
    found = facts.recall(guesses(words), rows(60, 1024), words, 0)
    assert found["probability"] == pytest.approx([facts.CHANCE] * 4, abs=0.01)
    # 720 questions: three standard errors.
    assert np.mean(found["exact"]) == pytest.approx(facts.CHANCE, abs=0.037)
    assert found["exact"] == found["among"]


@pytest.mark.parametrize("size", facts.PROBES)
def test_a_probe_asks_each_fact_once_at_its_distance(words: facts.Words, size: int) -> None:
    text, far = rows(1, size)[0], facts.PROBES[size]
    probe = facts.plant_probe(text, words, np.random.default_rng(3), far)
    assert sorted(probe.distances) == sorted(far * (facts.KINDS // len(far)))
    assert probe.asked.min() >= max(far)
    for at, kind, distance in zip(probe.asked, probe.kinds, probe.distances, strict=True):
        places = np.flatnonzero(probe.row == words.kinds[kind])
        assert places.tolist() == [at - distance, at]
        assert probe.row[at + 1] == probe.row[at - distance + 1]
        assert probe.row[at + 1] in words.values[kind]
    changed = np.flatnonzero(probe.row != text)
    assert len(changed) == 2 * facts.LINE * facts.KINDS


def test_a_training_row_teaches_answers_and_no_first_mentions(words: facts.Words) -> None:
    text = rows(1)[0][:1024]
    row, labels = facts.plant_stream(text, words, np.random.default_rng(2), 0.25)
    silent = labels == -100
    assert np.array_equal(row[~silent], labels[~silent])
    assert 0.3 < silent.mean() < 0.9
    known: dict[int, int] = {}
    answers = 0
    for at in np.flatnonzero(np.isin(row, words.kinds)):
        kind, value = int(row[at]), int(row[at + 1])
        assert silent[at]
        assert bool(silent[at + 1]) == (kind not in known)
        assert known.setdefault(kind, value) == value
        answers += not silent[at + 1]
    lines = int(1024 * 0.25 / 2)
    assert answers == lines - len(known) > 0.6 * lines
    text_left = ~np.isin(row, np.concatenate((words.kinds, words.values.flatten())))
    assert text_left.sum() == 1024 - 2 * lines
    assert np.array_equal(row[text_left], text[text_left])


def test_batches_grow_and_are_the_same_for_every_variant(corpus: Corpus) -> None:
    recipe = Variant.read("attention-full").recipe_for(0)
    batches = facts.FactBatches(corpus, recipe)
    for step, length in ((0, 128), (recipe.steps - 1, 1024)):
        assert batches.shape(step)[1] == length
    first, second = (next(iter(facts.FactBatches(corpus, recipe))) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert batches.tokens(1) == first[0].numel() == recipe.rows * recipe.length
    recipes = {v.recipe_for(0) for v in Variant.all() if v.group == "attention"}
    assert recipes == {recipe}


def test_variants_have_equal_parameters_and_less_to_do(corpus: Corpus) -> None:
    total, active, cost = [], [], {}
    row = corpus.domains["prose"].train[None, :2048]
    for variant in (v for v in Variant.all() if v.group == "attention"):
        model = variant.build(corpus, 0).eval()
        total.append(sum(p.numel() for p in model.parameters()))
        active.append(active_parameters(model))
        with torch.no_grad():
            cost[variant.name.removeprefix("attention-")] = context.measure_cost(model, row)
    assert max(total) / min(total) < 1.01
    assert max(active) / min(active) < 1.02
    assert all(a < t for a, t in zip(active, total, strict=True))
    # Two products over 2 heads of 64 channels, for each pair of tokens and layer, and no less.
    assert cost["full"]["flops"] > 4 * 2 * 64 * 4 * 2048 * 2049 / 2
    for name in ("csa-hca", "csa2-ced"):
        assert cost[name]["flops"] < 0.6 * cost["full"]["flops"], name
        # Keys of all tokens in four layers, float32.
        assert cost[name]["cache_bytes"] < 0.8 * 4 * 2048 * 64 * 4, name
    # What follows in a prompt is read from the entries of one decoder layer.
    ced = cost["csa2-ced"]
    assert ced["prefill_flops"] < 0.7 * ced["flops"]
    assert cost["window"]["cache_bytes"] < 0.2 * cost["csa-hca"]["cache_bytes"]


def test_an_untrained_model_knows_nothing_anywhere(corpus: Corpus) -> None:
    model = Variant.read("attention-window").build(corpus, 0).eval()
    domain = corpus.domains["prose"]
    found = context.measure_context(
        model, Corpus(corpus.tokenizer, {"prose": Domain(domain.train, domain.held_out[:16], 1)})
    )
    assert found["prose_by_place"] == pytest.approx([np.log(VOCABULARY)] * 7)
    assert found["recall"]["8192"]["probability"] == pytest.approx([1 / VOCABULARY] * 6)
    assert found["recall"]["1024"]["distances"] == [16, 32, 128, 512]
    assert found["chance"] == 1 / 8
    assert json.loads(json.dumps(found)) == found


def log(seed: int, loss: float, recalled: float, flops: int) -> dict[str, Any]:
    places = [loss + 0.1 * seed] * 7
    keys = ("exact", "among", "probability")
    recall = {
        str(size): dict.fromkeys(keys, [recalled] * len(d)) for size, d in facts.PROBES.items()
    }
    return {
        "seed": seed, "parameters": 1000, "active": 900, "flops": flops, "cache_bytes": flops,
        "prefill_flops": flops // 2, "prose_by_place": places, "code_by_place": places,
        "recall": recall, "chance": 0.125,
    }  # fmt: skip


def test_tables_compare_with_full_attention_seed_by_seed() -> None:
    variants = [v for v in Variant.all() if v.group == "attention"]
    found = {
        "attention-full": [log(0, 3.0, 1.0, 8_000_000_000), log(1, 3.0, 0.9, 8_000_000_000)],
        "attention-window": [log(1, 3.5, 0.2, 2_000_000_000)],
    }
    text = "\n".join(context_tables.attention_table(found, variants))
    assert (
        "| window of 32 alone | 1,000 | 900 | 2 | 25 % | 1 | 25 % | 2e+03 MB | 25 % | 1 |" in text
    )
    losses = next(x for x in text.splitlines() if x.startswith("| window of 32 alone | prose"))
    assert "3.6 (one seed)" in losses
    assert losses.endswith("| +0.500 (one seed) |")
    assert text.count("| full attention | 1,024 | likeliest of all | 0.95 ± 0.64 |") == 1
    assert text.count("7,168 back") == 1
    assert "| CSA + HCA (V4) | not run |" in text
    assert "| CSA + HCA (V4) | 1,024 |" not in text
    assert "| CSA + HCA (V4) | code | not run |" in text


def test_panels_draw_what_the_logs_say() -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots(1, 3)
    runs = [("full", [log(0, 3.0, 1.0, 8), log(1, 3.0, 0.8, 8)]), ("other", [log(0, 3.5, 0.2, 2)])]
    panels = context_tables.loss_panel, context_tables.recall_panel, context_tables.cost_panel
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, runs)
    short, long, other, _ = axes[1].containers
    assert short.lines[0].get_ydata() == pytest.approx([0.9] * 4)
    assert long.lines[0].get_ydata() == pytest.approx([0.9] * 6)
    assert other.lines[0].get_xdata().tolist() == list(facts.PROBES[1024])
    assert axes[0].containers[0].lines[0].get_ydata() == pytest.approx([3.05] * 7)
    assert [bar.get_height() for bar in axes[2].containers[1]] == [0.25, 0.25, 0.25]
