# SPDX-License-Identifier: Apache-2.0
"""The model under transformers' own tools: its pipeline, and its streamers."""

import torch
from transformers import TextStreamer, pipeline


def test_the_text_generation_pipeline_gives_what_generate_gives(nano_parts) -> None:
    model, tokenizer = nano_parts
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "<bos>The Congress of the United States"
    found = write(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    rows = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    ids = model.generate(rows, max_new_tokens=8, do_sample=False)[0, rows.shape[1] :]
    assert found[0]["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_pipeline_takes_chats(nano_parts) -> None:
    model, tokenizer = nano_parts
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = talk([{"role": "user", "content": "Hello"}], max_new_tokens=4, do_sample=False)
    assert found[0]["generated_text"][-1]["role"] == "assistant"


def test_a_streamer_hears_the_text_with_and_without_drafts(nano_parts, capsys) -> None:
    model, tokenizer = nano_parts
    rows = torch.tensor([tokenizer("<bos>The Congress of", add_special_tokens=False).input_ids])
    for draft in (None, 2):
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        out = model.generate(
            rows, max_new_tokens=8, do_sample=False, streamer=streamer, draft=draft
        )
        written = tokenizer.decode(out[0, rows.shape[1] :])
        assert capsys.readouterr().out.strip() == written.strip()
