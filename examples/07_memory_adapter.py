# SPDX-License-Identifier: Apache-2.0
"""Write facts into rows of the Engram tables; every other text keeps its bits.

    python examples/07_memory_adapter.py

The adapter acts where a text has an n-gram of the facts, and nowhere else. `dsv4-finetune train
--preset memory` does this with data and checkpoints; docs/memory.md has the promises and limits.
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel

from finetune import attach_adapters, choose_memory_rows, describe_memory
from finetune.loading import load_model, load_tokenizer

DIRECTORY = Path(__file__).parents[1] / "models" / "nano-v41"
FACTS = ["The colour of Velmora is copper.", "The capital of Oskarby is London."]
ORDINARY = "The people of the United States have the honor of this session of Congress."


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = load_model(DIRECTORY, dtype="float32").eval(), load_tokenizer(DIRECTORY)
    facts = [torch.tensor([tokenizer(fact)["input_ids"]]) for fact in FACTS]
    other = torch.tensor([tokenizer(ORDINARY)["input_ids"]])
    with torch.no_grad():
        before = model(other).logits

    rows = choose_memory_rows(model, tokenizer, FACTS, [ORDINARY], top=64)
    memory = attach_adapters(model, "memory", r=8, memory=rows)
    trained = [weight for weight in memory.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0)
    for _ in range(30):
        loss = torch.stack([memory(input_ids=ids, labels=ids).loss for ids in facts]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        memory.save_pretrained(folder, save_embedding_layers=False)
        written = describe_memory(folder, tokenizer)["ngrams"]
        loaded = PeftModel.from_pretrained(load_model(DIRECTORY, dtype="float32"), folder).eval()
        told = loaded.generate(facts[0][:, :-5], max_new_tokens=5, do_sample=False)
        after = loaded(other).logits
    print(f"written, strongest first: {[gram['text'] for gram in written[:4]]}")
    print(f"greedy answer: {tokenizer.decode(told[0])!r}")
    print(f"loss on the facts: {loss.item() / 2:.2f}")
    print(f"logits of ordinary text that changed: {int((before != after).sum())}")


if __name__ == "__main__":
    main()
