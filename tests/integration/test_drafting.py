# SPDX-License-Identifier: Apache-2.0
"""`generate(..., draft=...)`: a draft head changes how fast a text is written, never the text."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_dsv4 import Dsv4Cache
from modeling_dsv4.draft import Draft, Dsv4DraftHead
from modeling_dsv4.draft_plan import Weights

DSPARK = {
    "draft_kind": "dspark",
    "num_draft_layers": 2,
    "dspark_block_size": 5,
    "dspark_markov_rank": 4,
    "dspark_noise_token_id": 3,
}
HEADS = {
    "v4-mtp": ("v4", {"draft_kind": "mtp", "num_draft_layers": 1}),
    "v4-dspark": ("v4", {**DSPARK, "dspark_target_layer_ids": [1, 2, 3]}),
    "v41-dspark": ("v41", {**DSPARK, "dspark_target_layer_ids": [3, 5, 6]}),
}
NEW = 24
Make = Callable[..., Any]


@pytest.fixture(scope="module", params=HEADS)
def model(request: pytest.FixtureRequest, tiny: Make) -> Any:
    kind, head = HEADS[request.param]
    return _quiet(tiny(kind, torch.float64, **head))


@pytest.fixture(scope="module")
def dspark(tiny: Make) -> Any:
    kind, head = HEADS["v41-dspark"]
    return _quiet(tiny(kind, torch.float64, **head))


def _quiet(model: Any) -> Any:
    model.generation_config.pad_token_id = 2
    model.generation_config.eos_token_id = None
    return model


def _ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length))


def _write(model: Any, ids: torch.Tensor, **more: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True} | more
    return model.generate(ids, **settings)


@pytest.fixture
def clairvoyant(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A head that knows the text put into the list, and is wrong at every fifth place of it."""
    text: list[torch.Tensor] = []
    propose = Dsv4DraftHead.propose

    def guess(self: Any, model: Any, token: Any, count: int, state: Any, *rest: Any) -> Draft:
        draft = propose(self, model, token, count, state, *rest)
        at = (state.offset + state.seen - state.start)[:, None] + 1 + torch.arange(count)
        pads = text[0].shape[1] - text[1]
        known = text[0].gather(1, (at + pads[:, None]).clamp(max=text[0].shape[1] - 1))
        return draft._replace(tokens=torch.where(at % 5 == 3, 63 - known, known))

    monkeypatch.setattr(Dsv4DraftHead, "propose", guess)
    return text


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=["grows", "static"])
@pytest.mark.parametrize("draft", [1, 5])
def test_accepted_and_taken_back_guesses_change_no_token(
    model: Any, clairvoyant: list[torch.Tensor], draft: int, more: dict[str, Any]
) -> None:
    ids = _ids(23)
    expected = _write(model, ids).sequences
    clairvoyant += [expected, torch.tensor([expected.shape[1]])]
    found = _write(model, ids, draft=draft, **more)
    assert torch.equal(found.sequences, expected)
    counts = found.drafting
    assert counts.tokens == NEW - 1
    assert 0 < sum(counts.right) < sum(counts.made)
    # Four of five are right, so a pass gives more than one token.
    assert counts.passes < 0.7 * NEW
    # The cache has read what plain decoding has, and goes on from there.
    cache = found.past_key_values
    assert cache.get_seq_length() == ids.shape[1] + NEW - 1
    if not more:
        rest = {"attention_mask": torch.ones_like(expected), "max_new_tokens": 5}
        assert torch.equal(
            _write(model, expected, past_key_values=cache, **rest).sequences,
            _write(model, expected, **rest).sequences,
        )


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=["grows", "static"])
def test_rows_of_unequal_length_and_end_write_what_each_writes(
    model: Any, clairvoyant: list[torch.Tensor], more: dict[str, Any]
) -> None:
    ids, mask = _ids(23, batch=3), torch.ones(3, 23, dtype=torch.long)
    mask[1, :9], mask[2, :20] = 0, 0
    free = _write(model, ids, attention_mask=mask).sequences
    clairvoyant += [free, mask.sum(1) + NEW]
    stop = int(free[1, 23 + 8])
    for end in (None, stop):
        plain = _write(model, ids, attention_mask=mask, eos_token_id=end)
        found = _write(model, ids, attention_mask=mask, eos_token_id=end, draft=5, **more)
        assert torch.equal(found.sequences, plain.sequences)
        # All counters of the cache, of rows that ended early as well.
        for a, b in zip(
            plain.past_key_values.state.tensors(),
            found.past_key_values.state.tensors(),
            strict=True,
        ):
            assert torch.equal(a, b)
        assert found.past_key_values.columns == plain.past_key_values.columns


def test_rewinding_rows_is_as_if_what_was_taken_back_had_never_been(tiny: Make) -> None:
    for kind, head in HEADS.values():
        model, ids = tiny(kind, torch.float64, **head), _ids(40, batch=3)
        with torch.no_grad():
            for length in (21, 24, 28):
                cache, alone = Dsv4Cache(model.config), Dsv4Cache(model.config)
                cache.drafts.begin(None)
                model(ids[:, :length], past_key_values=cache)
                back = torch.tensor([0, 3, 7])
                cache.rewind(back)
                mask = torch.arange(length) >= back[:, None]
                pairs = zip(ids[:, :length], back.tolist(), strict=True)
                shifted = torch.stack([row.roll(n) for row, n in pairs])
                alone.drafts.begin(None)
                model(shifted, attention_mask=mask, past_key_values=alone)
                after = [model(ids[:, :6], past_key_values=c).logits for c in (cache, alone)]
                torch.testing.assert_close(*after, atol=1e-9, rtol=0)
                drafts = [
                    model.mtp.propose(
                        model, ids[:, 0], 2, c.state, c.drafts, lambda _, x: x.argmax(-1)
                    ).logits
                    for c in (cache, alone)
                ]
                torch.testing.assert_close(*drafts, atol=1e-9, rtol=0)


def test_samples_have_the_distribution_of_plain_sampling(tiny: Make) -> None:
    # So hot that a head of random weights is often right.
    model = _quiet(tiny("window", **DSPARK, dspark_target_layer_ids=[0]))
    ids, rows, heat = _ids(12), 4000, 3.0
    torch.manual_seed(0)
    hot = {"do_sample": True, "top_k": 0, "temperature": heat, "max_new_tokens": 3}
    found = _write(model, ids, num_return_sequences=rows, draft=2, **hot)
    counts = found.drafting
    assert 0.2 * counts.made[0] < counts.right[0] < 0.9 * counts.made[0]
    # What plain sampling gives, exactly: all texts of three tokens, told apart by quarters of ids.
    texts, chance = ids, torch.ones(1)
    with torch.no_grad():
        for _ in range(3):
            p = model(texts, use_cache=False, logits_to_keep=1).logits[:, 0].div(heat).softmax(-1)
            chance = (chance[:, None] * p).flatten()
            every = torch.arange(64).repeat(len(texts))[:, None]
            texts = torch.cat((texts.repeat_interleave(64, 0), every), dim=1)
    wanted = rows * chance.double().view(4, 16, 4, 16, 4, 16).sum((1, 3, 5)).flatten()
    a, b, c = (found.sequences[:, 12:] // 16).unbind(1)
    seen = torch.bincount(16 * a + 4 * b + c, minlength=64)
    assert wanted.min() > 5
    chi = ((seen - wanted) ** 2 / wanted).sum()
    # The upper tail of chi-square with 63 degrees of freedom.
    assert torch.special.gammaincc(torch.tensor(31.5).double(), chi / 2) > 1e-3


@pytest.mark.parametrize(
    ("head", "bold", "rows"),
    [
        (HEADS["v4-mtp"][1], 1.0, 1),
        (HEADS["v4-mtp"][1], 1.0, 2),
        (DSPARK | {"dspark_target_layer_ids": [0]}, 0.8, 2),
    ],
    ids=["always-right", "two-rows", "often-right"],
)
def test_guessing_where_it_pays_leaves_samples_their_distribution(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, head: dict[str, Any], bold: float, rows: int
) -> None:
    model = _quiet(tiny("window", torch.float64, **head))

    def weigh(parts: list[Any]) -> Weights:
        # A guess has to be right two times of five to be worth the head's pass.
        return Weights(1e6, 1e4, 8 if parts[0] is model.model else 3, experts=8, active=2)

    monkeypatch.setattr(Weights, "of", staticmethod(weigh))
    # Blind to all but the last token, so that a table is a head as good as one likes.
    for layer in model.model.layers:
        layer.self_attn.o_b_proj.weight.data.zero_()
    with torch.no_grad():
        logits = model(torch.arange(64)[:, None], use_cache=False).logits[:, 0]
        model.lm_head.weight.data.mul_(3 / logits.std())
        logits = model(torch.arange(64)[:, None], use_cache=False).logits[:, 0]

    def propose(_: Any, __: Any, token: Any, count: int, ___: Any, ____: Any, pick: Any) -> Draft:
        tokens, scores = token[:, None], []
        for _i in range(count):
            scores.append(bold * logits[tokens[:, -1]])
            tokens = torch.cat((tokens, pick(tokens[:, 1:], scores[-1])[:, None]), dim=1)
        found = torch.stack(scores, 1)
        sure = found.softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return Draft(tokens[:, 1:], found, torch.logit(sure, eps=1e-6))

    monkeypatch.setattr(Dsv4DraftHead, "propose", propose)
    torch.manual_seed(0)
    more = {"do_sample": True, "top_k": 0, "num_return_sequences": rows, "draft": "auto"}
    runs = [_write(model, _ids(3), max_new_tokens=24, **more) for _ in range(60)]
    texts = torch.cat([run.sequences[:, 2:] for run in runs])
    p, new = logits.softmax(-1)[texts[:, :-1]], texts[:, 1:, None]
    # Likelier tokens first: where a token lies on [0, 1], any point of its own share of it.
    own = p.gather(2, new)
    place = (p * (p > own)).sum(-1) + torch.rand(own.shape[:2]) * own[..., 0]
    seen, wanted = torch.histc(place, 10, 0, 1), place.numel() / 10
    chi = ((seen - wanted) ** 2 / wanted).sum()
    # The upper tail of chi-square with 9 degrees of freedom.
    assert torch.special.gammaincc(torch.tensor(4.5).double(), chi / 2) > 1e-3
    # Guesses were checked, and mostly right.
    assert all(sum(run.drafting.right) > 6 for run in runs)


def test_processors_see_the_row_they_work_on(dspark: Any, clairvoyant: list[torch.Tensor]) -> None:
    ids, mask = _ids(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    more = {"attention_mask": mask, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = _write(dspark, ids, **more).sequences
    clairvoyant += [expected, mask.sum(1) + NEW]
    assert torch.equal(_write(dspark, ids, draft=3, **more).sequences, expected)


def test_drafting_by_itself_gives_up_a_head_that_guesses_wrong(dspark: Any) -> None:
    ids = _ids(20)
    found = _write(dspark, ids, draft="auto", max_new_tokens=60)
    assert torch.equal(found.sequences, _write(dspark, ids, max_new_tokens=60).sequences)
    counts = found.drafting
    assert counts.head_passes < counts.passes
    assert dspark.stats()["draft_passes"] >= counts.passes


def test_a_prompt_read_before_is_drafted_behind_too(
    dspark: Any, clairvoyant: list[torch.Tensor]
) -> None:
    first, cache = _ids(20), Dsv4Cache(dspark.config)
    with torch.no_grad():
        dspark(first[:, :15], past_key_values=cache)
    expected = _write(dspark, first).sequences
    clairvoyant += [expected, torch.tensor([expected.shape[1]])]
    found = _write(dspark, first, past_key_values=cache, draft=4)
    assert torch.equal(found.sequences, expected)
    # Keys that were not written are not read.
    assert cache.drafts.since.tolist() == [15]


def test_adapters_count_in_the_text_and_the_head_follows(
    dspark: Any, clairvoyant: list[torch.Tensor]
) -> None:
    from peft import LoraConfig, get_peft_model

    targets = r".*model\.layers\.\d+\.self_attn\.(q_b_proj|kv_proj)"
    ids, settings = _ids(20), {"max_new_tokens": NEW, "do_sample": False}
    adapted = get_peft_model(dspark, LoraConfig(target_modules=targets, init_lora_weights=False))
    try:
        assert not any("mtp" in n for n, p in adapted.named_parameters() if p.requires_grad)
        with_adapters = adapted.generate(input_ids=ids, **settings)
        clairvoyant += [with_adapters, torch.tensor([with_adapters.shape[1]])]
        drafted = adapted.generate(input_ids=ids, draft=3, **settings)
        assert torch.equal(drafted, with_adapters)
        with adapted.disable_adapter():
            base = adapted.generate(input_ids=ids, **settings)
            clairvoyant[0] = base
            drafted = adapted.generate(input_ids=ids, draft=3, **settings)
        assert torch.equal(drafted, base) and not torch.equal(base, with_adapters)
    finally:
        adapted.unload()


def test_experts_on_disk_are_read_for_guesses_and_counted(tiny: Make, tmp_path: Path) -> None:
    import quantize  # noqa: F401  (knows the storage)
    from modeling_dsv4 import Dsv4ForCausalLM
    from quantize.config import get_recipe
    from quantize.convert import convert

    kind, head = HEADS["v41-dspark"]
    tiny(kind, **head).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "packed", get_recipe("fp4"))
    budget = 4 * 4096
    model = _quiet(
        Dsv4ForCausalLM.from_pretrained(
            tmp_path / "packed", dtype=torch.float32, expert_memory=budget
        ).eval()
    )
    ids = _ids(20)
    expected, before = _write(model, ids).sequences, model.stats()["bytes_read"]
    found = _write(model, ids, draft=3)
    assert torch.equal(found.sequences, expected)
    read = model.stats()["bytes_read"] - before
    # The prompt's pass is not a drafting one.
    assert 0 < found.drafting.fetched < read
    assert found.drafting.stats()["draft_bytes_per_token"] == found.drafting.fetched / (NEW - 1)


@pytest.mark.parametrize("draft", [0, 7, True, "fast"])
def test_impossible_wishes_are_refused_and_none_of_them_is_plain(model: Any, draft: Any) -> None:
    ids = _ids(6)
    if draft == 0:
        assert "drafting" not in _write(model, ids, draft=0, max_new_tokens=2)
        return
    if draft == 7 and model.config.draft_kind == "mtp":
        return
    with pytest.raises(ValueError, match='wanted "auto", None, or 1 to'):
        _write(model, ids, draft=draft)


def test_what_drafting_cannot_do_is_named(model: Any, tiny: Make) -> None:
    ids = _ids(6)
    for more in ({"num_beams": 2}, {"output_logits": True}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(NotImplementedError, match=next(iter(more)).removeprefix("output_")):
            _write(model, ids, draft=2, **more)
    with pytest.raises(ValueError, match="use_cache=True"):
        _write(model, ids, draft=2, use_cache=False)
    bare = _quiet(tiny("v4", torch.float64))
    with pytest.raises(ValueError, match="wanted a model with a draft head"):
        _write(bare, ids, draft=2)
    assert torch.equal(
        _write(bare, ids, draft="auto", max_new_tokens=3).sequences,
        _write(bare, ids, max_new_tokens=3).sequences,
    )


def test_streamed_tokens_are_those_of_the_text(dspark: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.parts: list[torch.Tensor] = []

        def put(self, tokens: torch.Tensor) -> None:
            self.parts.append(tokens.flatten())

        def end(self) -> None:
            self.parts.append(torch.tensor([-1]))

    streamer, ids = Streamer(), _ids(9)
    found = _write(dspark, ids, draft=2, streamer=streamer, max_new_tokens=12).sequences[0]
    assert list(itertools.chain(*(p.tolist() for p in streamer.parts))) == [*found.tolist(), -1]
