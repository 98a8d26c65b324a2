# SPDX-License-Identifier: Apache-2.0
"""Decoding with a draft head: propose, check in one pass, keep what the backbone agrees with.

```
cache holds all but the last token x
  propose      x -> d_1 .. d_k                          the head, from what the backbone left
  check        [x, d_1 .. d_k] -> p_0 .. p_k            one pass of the backbone
  accept       d_1 .. d_n and one token more from p_n   greedy: while d = argmax p
  rewind       the k - n tokens behind                  every counter of the cache, row by row
```

The text is the backbone's own: greedy tokens are those of plain decoding (but for ties closer than
rounding, as a pass of several columns sums in another order than one), and samples have plain
sampling's distribution (Leviathan et al., 2023; Chen et al., 2023). For that, how many guesses a
sampling pass checks stands before any of them is drawn: it follows from earlier passes alone.

Why not transformers' `CandidateGenerator`: its loop takes one sequence and no static cache, asks
for the whole prompt's hidden states, and keeps the drafter's state outside of the cache. Here it
lies in the cache's rings and moves with its counters. Preparing and stopping stay transformers':
this loop stands in the place of `_sample` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache import Dsv4Cache
from .draft import Draft
from .draft_plan import CostModel, DraftCounts, Plan, Weights

if TYPE_CHECKING:
    from .modeling_dsv4 import Dsv4ForCausalLM

_OUTPUTS = ("scores", "logits", "hidden_states", "attentions")


@dataclass
class DraftedOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns, and `drafting`: counters of this call."""

    drafting: DraftCounts | None = None


def accept_greedy(tokens: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep guesses [B, k] while they are the argmax of scores [B, k + 1, V].

    Returns:
        how many [B], and the token that follows them [B].
    """
    choice = scores.argmax(-1)
    count = (choice[:, :-1] == tokens).long().cumprod(1).sum(1)
    return count, choice.gather(1, count[:, None])[:, 0]


def accept_samples(
    tokens: torch.Tensor, guessed: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep guesses [B, k] so that the text is a sample of the backbone's.

    A guess d drawn from q is kept with probability min(1, p(d) / q(d)); behind the first one that
    is not, the next token is drawn from max(p - q, 0), normalised; behind all of them from p.

    Args:
        tokens: [B, k].
        guessed: [B, k, V] the probabilities q they were drawn from.
        wanted: [B, k + 1, V] the backbone's, p.

    Returns:
        how many [B], and the token that follows them [B].
    """
    at = tokens[..., None]
    p, q = wanted[:, :-1].gather(2, at)[..., 0], guessed.gather(2, at)[..., 0]
    kept = torch.rand_like(p) * q < p
    count = kept.long().cumprod(1).sum(1)
    rows = torch.arange(len(tokens), device=tokens.device)
    rest = torch.cat((guessed, torch.zeros_like(wanted[:, :1])), dim=1)[rows, count]
    left = (wanted[rows, count] - rest).clamp(min=0)
    # Where p and q are equal but for rounding nothing is left to draw from.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, wanted[rows, count])
    return count, torch.multinomial(left, num_samples=1)[:, 0]


class Texts:
    """Rows of ids at different lengths, what may still be written, and when each has ended."""

    def __init__(self, ids: torch.Tensor, most: int, pad: int, criteria: Any) -> None:
        room = max(most - ids.shape[1], 0)
        filler = torch.full((ids.shape[0], room), pad, dtype=ids.dtype, device=ids.device)
        self.ids, self.most, self.criteria = torch.cat((ids, filler), dim=1), most, criteria
        self.length = [ids.shape[1]] * ids.shape[0]
        # Tokens of each row that the cache has read; a row that ended stays where it was.
        self.read = [ids.shape[1]] * ids.shape[0]
        self.open = [True] * ids.shape[0]

    def last(self) -> torch.Tensor:
        """The last token of every row [B]; any token where it ended."""
        at = torch.tensor([n - 1 for n in self.length], device=self.ids.device)
        return self.ids.gather(1, at[:, None])[:, 0]

    def most_guesses(self) -> int:
        """Guesses that still fit into every row, the token behind them included."""
        return max(self.most - 2 - max(self.read), 0)

    def append(self, row: int, tokens: list[int]) -> int:
        """Write tokens until the row ends; how many were written."""
        for i, token in enumerate(tokens, start=1):
            at = self.length[row]
            self.ids[row, at] = token
            self.length[row] = at + 1
            if bool(self.criteria(self.ids[row : row + 1, : at + 1], None).any()):
                self.open[row] = False
                return i
        return len(tokens)

    def process(
        self, processors: LogitsProcessorList, logits: torch.Tensor, guesses: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, V] behind each row and its guesses [B, i], as `generate` changes them."""
        logits = logits.to(torch.float32, copy=True)
        if not processors:
            return logits
        lengths, out = torch.tensor(self.length, device=logits.device), logits.clone()
        for length in lengths.unique().tolist():
            # All rows, since some processors know their number; those of another length are no
            # one's.
            before = torch.cat((self.ids[:, :length], guesses), dim=1)
            rows = lengths == length
            out[rows] = processors(before, logits.clone())[rows]
        return out


class Drafter:
    """One call of `generate` with a draft head."""

    def __init__(
        self,
        model: Dsv4ForCausalLM,
        cache: Dsv4Cache,
        texts: Texts,
        plan: Plan,
        processors: LogitsProcessorList,
        samples: bool,
    ) -> None:
        self.model, self.cache, self.texts, self.plan = model, cache, texts, plan
        self.processors, self.samples = processors, samples
        stores = (getattr(m, "store", None) for m in model.modules())
        self._stores = {id(s): s for s in stores if s is not None}
        self.counts = DraftCounts()

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """A token [B] of processed scores [B, V], as plain decoding chooses it."""
        if self.samples:
            return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        return scores.argmax(-1)

    def step(self) -> list[int]:
        """One pass of the backbone; what the first row has got from it."""
        token, before = self.texts.last(), self._fetched()
        draft, guessed = self._propose(token)
        middle = self._fetched()
        k = draft.tokens.shape[1]
        fed = torch.cat((token[:, None], draft.tokens), dim=1)
        logits = self.model(fed, past_key_values=self.cache, use_cache=True).logits
        after = self._fetched()
        if self.plan.costs is not None:
            self.plan.costs.observe(fed.numel(), after - middle)
        self.counts.passes += 1
        self.counts.fetched += after - before
        scores = torch.stack(
            [
                self.texts.process(self.processors, logits[:, i], draft.tokens[:, :i])
                for i in range(k + 1)
            ],
            dim=1,
        )
        if self.samples:
            count, more = accept_samples(draft.tokens, guessed, scores.softmax(-1))
        else:
            count, more = accept_greedy(draft.tokens, scores)
        rows = torch.tensor(self.texts.open, device=count.device)
        self.plan.observe(draft.confidence.float().sigmoid()[rows], count[rows])
        return self._write(draft.tokens, count, more)

    def _propose(self, token: torch.Tensor) -> tuple[Draft, torch.Tensor]:
        """Guesses worth checking, and the probabilities [B, k, V] they were drawn from."""
        most = min(self.plan.ask(sum(self.texts.open)), self.texts.most_guesses())
        nothing = token[:, None][:, :0]
        if not most:
            empty = torch.zeros(len(token), 0, self.model.config.vocab_size, device=token.device)
            return Draft(nothing, empty, empty[..., 0]), empty
        processed: list[torch.Tensor] = []

        def pick(guesses: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            processed.append(self.texts.process(self.processors, logits, guesses))
            return self.choose(processed[-1])

        before = self._fetched()
        state = self.cache.state
        assert state is not None
        head = self.model.mtp
        draft = head.propose(self.model, token, most, state, self.cache.drafts, pick)
        self.counts.head_passes += 1
        if self.plan.costs is not None:
            self.plan.costs.observe_head(self._fetched() - before)
        rows = torch.tensor(self.texts.open, device=token.device)
        k = self.plan.keep(draft.confidence.float().sigmoid()[rows])
        guessed = torch.stack(processed, dim=1)[:, :k].softmax(-1)
        return Draft(*(part[:, :k] for part in draft)), guessed

    def _write(self, tokens: torch.Tensor, count: torch.Tensor, more: torch.Tensor) -> list[int]:
        """Append what was accepted and let the cache forget the rest."""
        k, written = tokens.shape[1], [0] * len(tokens)
        first: list[int] = []
        live = list(self.texts.open)
        for row, (guesses, n) in enumerate(zip(tokens.tolist(), count.tolist(), strict=True)):
            if live[row]:
                new = [*guesses[:n], int(more[row])]
                written[row] = self.texts.append(row, new)
                self.counts.add(k, n, written[row])
                first = new[: written[row]] if row == 0 else first
        if any(self.texts.open):
            # A row that ends stays behind: the others may then guess as much as fits beside it.
            written = [n if on else 0 for n, on in zip(written, self.texts.open, strict=True)]
        self.texts.read = [a + b for a, b in zip(self.texts.read, written, strict=True)]
        back = torch.tensor([k + 1 - n for n in written], device=tokens.device)
        self.cache.rewind(back)
        return first

    def settle(self) -> None:
        """Let the cache read what plain decoding would have: all rows, pads too, but the last."""
        end, read = max(self.texts.length) - 1, self.texts.read
        # A full row of a static cache has room for one column that counts nothing.
        step = 1 if self.cache.is_static else max(end - min(read), 1)
        for done in range(0, end - min(read), step):
            at = torch.tensor(read)[:, None] + done + torch.arange(step)
            real = (at < end).to(self.texts.ids.device)
            at = at.clamp(max=self.texts.ids.shape[1] - 1).to(self.texts.ids.device)
            fed = self.texts.ids.gather(1, at)
            self.model(fed, attention_mask=real, past_key_values=self.cache, logits_to_keep=1)

    def _fetched(self) -> float:
        # Rows of Engram tables are nothing beside experts, and have counts of their own.
        return sum(float(s.stats().get("bytes_read", 0)) for s in self._stores.values())


def decode_with_drafts(
    model: Dsv4ForCausalLM,
    input_ids: torch.Tensor,
    draft: int | str,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> DraftedOutput | torch.Tensor:
    """What `generate(..., draft=...)` does once transformers has prepared its arguments."""
    if synced_gpus:
        raise NotImplementedError("draft together with synced_gpus: rows end at different passes")
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, Dsv4Cache):
        raise ValueError("draft: wanted use_cache=True, since guesses are checked against a cache")
    samples = bool(generation_config.do_sample)
    plan = _plan(model, draft, cache.max_rewind, samples)
    cache.drafts.begin(cache.state.seen if cache.is_initialized and cache.state else None)
    logits = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
    pad = generation_config._pad_token_tensor
    most = cast(int, generation_config.max_length)
    texts = Texts(input_ids, most, 0 if pad is None else int(pad), stopping_criteria)
    drafter = Drafter(model, cache, texts, plan, logits_processor, samples)
    first = drafter.choose(texts.process(logits_processor, logits, input_ids[:, :0]))
    for row, token in enumerate(first.tolist()):
        texts.append(row, [token])
    if streamer is not None:
        streamer.put(first.cpu())
    while any(texts.open):
        new = drafter.step()
        if streamer is not None:
            streamer.put(torch.tensor(new))
    if streamer is not None:
        streamer.end()
    drafter.settle()
    model.mtp.counts.merge(drafter.counts)
    sequences = texts.ids[:, : max(texts.length)]
    if not generation_config.return_dict_in_generate:
        return sequences
    return DraftedOutput(
        sequences=cast(torch.LongTensor, sequences), past_key_values=cache, drafting=drafter.counts
    )


def check_settings(config: GenerationConfig) -> None:
    """Refuse what drafting does not do.

    Raises:
        NotImplementedError: beams, guidance, other helpers, outputs of every step.
    """
    asked = [name for name in _OUTPUTS if getattr(config, f"output_{name}")]
    asked += ["num_beams"] if (config.num_beams or 1) > 1 else []
    helpers = ("guidance_scale", "prompt_lookup_num_tokens", "assistant_early_exit")
    asked += [name for name in helpers if getattr(config, name, None) not in (None, 1, 1.0)]
    if asked:
        raise NotImplementedError(
            f"draft together with {', '.join(asked)}: drafting writes greedy text or samples, and "
            "keeps nothing of each step; leave draft out"
        )


def _plan(model: Dsv4ForCausalLM, draft: int | str, rewind: int, samples: bool) -> Plan:
    config = model.config
    block = config.dspark_block_size if config.draft_kind == "dspark" else rewind - 1
    if draft == "auto":
        # One block of DSpark. MTP was trained to guess one token, and a second one now and then.
        most = min(block or 1, rewind - 1) if config.draft_kind == "dspark" else 2
        backbone = Weights.of([model.model, model.lm_head])
        head = Weights.of([model.mtp, model.lm_head])
        return Plan(most, CostModel(backbone, head), samples)
    if not isinstance(draft, int) or isinstance(draft, bool) or not 1 <= draft <= (block or 1):
        raise ValueError(
            f'draft: wanted "auto", None, or 1 to {block} guesses a step, got {draft!r}'
        )
    return Plan(draft, None)
