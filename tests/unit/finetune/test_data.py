# SPDX-License-Identifier: Apache-2.0
"""Encoding, loss mask, packing, and batches."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune.data import (
    IGNORED,
    Example,
    Examples,
    PackingCollator,
    PaddingCollator,
    encode_record,
    encode_records,
    pack_examples,
    pad_token,
)
from finetune.records import Record

CHAT = Record(
    1,
    "messages",
    {
        "messages": [
            {"role": "system", "content": "the rules"},
            {"role": "user", "content": "the meter?"},
            {"role": "assistant", "content": "nine years"},
            {"role": "user", "content": "and the battery?"},
            {"role": "assistant", "content": "it lasts too"},
        ]
    },
)
PAIR = Record(2, "prompt", {"prompt": "the meter", "completion": " lasts nine years"})
TEXT = Record(3, "text", {"text": "the battery lasts"})


def _seen(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """What the loss sees, special tokens included."""
    return tokenizer.decode([i for i in example.labels if i != IGNORED])


def _example(line: int, size: int) -> Example:
    ids = list(range(100 * line, 100 * line + size))
    return Example(line, ids, [IGNORED, *ids[1:]])


def test_a_conversation_is_masked_but_for_its_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_record(CHAT, tokenizer, 512)
    assert tokenizer.decode(example.input_ids) == (
        "<bos>the rules<|user|>the meter?<|assistant|>nine years<eos>"
        "<|user|>and the battery?<|assistant|>it lasts too<eos>"
    )
    assert _seen(example, tokenizer) == "nine years<eos>it lasts too<eos>"


def test_a_pair_is_masked_but_for_its_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_record(PAIR, tokenizer, 512)
    assert tokenizer.decode(example.input_ids) == "<bos>the meter lasts nine years<eos>"
    assert _seen(example, tokenizer) == " lasts nine years<eos>"


def test_a_prompt_is_tokenized_as_it_will_be_when_it_stands_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    record = Record(1, "prompt", {"prompt": "the bat", "completion": "tery"})
    alone = tokenizer("the bat", add_special_tokens=False)["input_ids"]
    assert encode_record(record, tokenizer, 512).input_ids[1 : 1 + len(alone)] == alone


def test_a_text_counts_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_record(TEXT, tokenizer, 512)
    assert _seen(example, tokenizer) == "the battery lasts<eos>"
    assert example.labels[0] == IGNORED


def test_loss_on_all_counts_everything_behind_the_first_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for record in (CHAT, PAIR, TEXT):
        example = encode_record(record, tokenizer, 512, loss_on="all")
        assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_long_examples_are_cut_and_hopeless_ones_dropped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    examples, report = encode_records([CHAT, PAIR, TEXT], tokenizer, 5)
    assert [len(example.input_ids) for example in examples] == [5, 5]
    assert (report.examples, report.truncated, report.dropped) == (2, 3, 1)
    assert report.label_tokens == sum(example.num_labels for example in examples)
    with pytest.raises(ValueError, match="wanted answers within 3 tokens, got none"):
        encode_records([CHAT], tokenizer, 3)


def test_what_the_prompt_format_cannot_say_is_named_by_line(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    content = {"messages": [{"role": "assistant", "content": "nine years"}]}
    with pytest.raises(ValueError, match="line 12: chat: wanted a user message"):
        encode_record(Record(12, "messages", content), tokenizer, 512)


def test_padding_masks_and_ignores_what_it_adds() -> None:
    batch = PaddingCollator(2)([Examples([_example(1, 4), _example(2, 2)])[i] for i in (0, 1)])
    assert batch["input_ids"].tolist() == [[100, 101, 102, 103], [200, 201, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 101, 102, 103], [-100, 201, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_packing_restarts_positions_and_hides_each_first_token() -> None:
    rows = Examples([_example(1, 3), _example(2, 2), _example(3, 4)], pack_to=5)
    batch = PackingCollator()([rows[i] for i in range(len(rows))])
    assert batch["input_ids"].tolist() == [[300, 301, 302, 303, 100, 101, 102, 200, 201]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    starts = batch["position_ids"] == 0
    assert bool((batch["labels"][starts] == IGNORED).all())
    assert torch.equal(batch["labels"][~starts], batch["input_ids"][~starts])


def test_packed_rows_hold_every_document_once_and_never_overflow() -> None:
    examples = [_example(i, 1 + i * 7 % 11) for i in range(1, 30)]
    rows = pack_examples(examples, 12)
    assert sorted(e.line for row in rows for e in row) == list(range(1, 30))
    sizes = [sum(len(e.input_ids) for e in row) for row in rows]
    assert max(sizes) <= 12
    # First fit: no two rows could share one.
    assert all(a + b > 12 for i, a in enumerate(sizes) for b in sizes[:i])
    assert pack_examples(examples, 12) == rows


def test_the_end_token_fills_rows_where_there_is_no_pad(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    assert (pad_token(tokenizer), pad_token(bare)) == (2, 1)


def _losses_of_documents(
    model: PreTrainedModel, rows: Examples, collate: PackingCollator | PaddingCollator
) -> dict[tuple[int, ...], torch.Tensor]:
    """Summed loss of every document, by its tokens."""
    batch = collate([rows[i] for i in range(len(rows))])
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    pairs = logits[:, :-1].transpose(1, 2).double(), labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(*pairs, ignore_index=IGNORED, reduction="none")
    losses = torch.nn.functional.pad(losses, (1, 0))
    found, at = {}, 0
    for row, documents in enumerate(rows.rows):
        at = at if rows.packed else 0
        for document in documents:
            some = losses[0 if rows.packed else row, at : at + len(document)]
            found[tuple(document.input_ids)] = some.sum()
            at += len(document)
    return found


@pytest.mark.parametrize("kind", ["v4", "v4.1"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 5e-5), (torch.float64, 1e-12)])
def test_every_packed_document_has_the_loss_it_has_alone(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    dtype: torch.dtype,
    atol: float,
) -> None:
    model = make_model(kind).to(dtype)
    records = [
        Record(i, "prompt", {"prompt": f"meter {i} " * (1 + i % 4), "completion": f"{i} years"})
        for i in range(14)
    ]
    examples, _ = encode_records(records, tokenizer, 64)
    packed = Examples(examples, 64)
    assert len(packed) < len(examples) / 2
    alone = {}
    for example in examples:
        alone |= _losses_of_documents(model, Examples([example]), PaddingCollator(2))
    assert len(alone) == len(examples)
    padded = _losses_of_documents(model, Examples(examples), PaddingCollator(2))
    for found in (_losses_of_documents(model, packed, PackingCollator()), padded):
        for ids, loss in alone.items():
            torch.testing.assert_close(found[ids], loss, atol=atol, rtol=0)
            assert loss > 0


def test_fill_is_the_share_of_places_that_hold_a_token() -> None:
    examples = [_example(1, 3), _example(2, 2), _example(3, 4)]
    assert Examples(examples, pack_to=5).fill == 9 / 10
    assert Examples(examples).fill == 9 / 12
