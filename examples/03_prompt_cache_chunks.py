# SPDX-License-Identifier: Apache-2.0
"""Read a long prompt once, in chunks, keep it on disk, and continue it several times.

    python examples/03_prompt_cache_chunks.py

A `Dsv4Cache` keeps the last window of every layer and the compressed entries of a few; how the
prompt was cut into chunks leaves no trace in it. `storage="packed"` would keep the entries in the
release's own formats.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_dsv4 import Dsv4Cache, Dsv4ForCausalLM

DIRECTORY = Path(__file__).parents[1] / "tests" / "golden" / "v41_a_bf16"


@torch.no_grad()
def main(folder: Path) -> None:
    inputs = load_file(DIRECTORY / "inputs.safetensors")
    model = Dsv4ForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    model.set_engram_token_map(inputs["compressed_token_map"])
    prompt, first, second = inputs["input_ids"].split([300, 26, 26], dim=1)

    cache = Dsv4Cache(model.config)
    for chunk in prompt.split([128, 1, 64, 107], dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    cache.save(folder / "prompt.safetensors", prompt)
    print(f"cache of {cache.get_seq_length()} tokens: {cache.memory_bytes():,} bytes")

    worst, changed = 0.0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for question in (first, second):
        ids = torch.cat((prompt, question), dim=1)
        # Refused unless the ids begin with the prompt that was read.
        cache = Dsv4Cache.load(folder / "prompt.safetensors", model.config, ids)
        cached = model(question, past_key_values=cache).logits
        fresh = model(ids, use_cache=False, logits_to_keep=question.shape[1]).logits
        worst = max(worst, (cached - fresh).abs().max().item())
        # The cache grew in place by the question; take it back and ask again.
        cache.crop(-question.shape[1])
        answer = model.generate(ids, past_key_values=cache, **options)
        changed += not torch.equal(answer, model.generate(ids, **options))
    print(f"answers that the cache changed: {changed}")
    print(f"largest difference between cached and fresh logits: {worst:.1e}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
