# SPDX-License-Identifier: Apache-2.0
"""What the routed experts of a model are fed with: second moments of their inputs, from a text.

Kept for every experts module and projection P, summed over tokens, each counting its routing weight
squared as in the layer's output:

| tensor | shape | what |
|---|---|---|
| `NAME.P.moment` | [D, D] or [F, F] float32 | second moments over all experts together |
| `NAME.P.diagonal` | [E, D] or [E, F] float32 | sums of squares of each expert |
| `NAME.counts` | [E] int64 | tokens that each expert saw |
| `NAME.sample` | [<= 64, D] bfloat16 | some of the inputs |

An expert's moments are the layer's correlations with its own diagonal: E full matrices would not
fit anywhere. An expert that saw few tokens borrows from the layer, so none is without data. At the
sizes of V4-Flash (43 layers, D = 4096, F = 2048, E = 256) that is 84 MB + 6.3 MB a layer, 3.9 GB in
all, in memory while gathering and then in the file; V4-Pro's 61 layers take 15.5 GB. `layers`
gathers some at a time. Gathering is a forward pass: experts may lie on disk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from modeling_dsv4.moe import ExpertsBase, Linear

from .pack import PROJECTIONS

SAMPLE = 64
# So many tokens of the layer's average are added to an expert's own.
SHRINKAGE = 32


class Calibration:
    """Statistics by experts module, from memory or lazily from a file.

    Args:
        tensors: reads a tensor by name.
        names: of all tensors.
    """

    def __init__(self, tensors: Callable[[str], torch.Tensor], names: Iterable[str]) -> None:
        self._tensor = tensors
        self._names = sorted(names)
        self.modules = [n.removesuffix(".counts") for n in self._names if n.endswith(".counts")]
        # The layer's correlations serve all of its experts, one after the other.
        self._last: tuple[str, torch.Tensor] | None = None

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> "Calibration":
        """Statistics in memory."""
        return cls(tensors.__getitem__, tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Open a file; tensors are read when asked for."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: wanted a file of calibration statistics, found none")
        file = safe_open(str(path), framework="pt")
        return cls(file.get_tensor, file.keys())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, beside its name and then renamed."""
        beside = Path(f"{path}.tmp")
        save_file({n: self._tensor(n).contiguous() for n in self._names}, str(beside))
        beside.replace(path)

    def counts(self, module: str) -> torch.Tensor:
        """Tokens that each expert of a module saw: [E] int64."""
        return self._tensor(f"{module}.counts")

    def sample(self, module: str) -> torch.Tensor:
        """Some inputs of a module: [n, D] float32."""
        return self._tensor(f"{module}.sample").float()

    def diagonal(self, module: str, projection: str) -> torch.Tensor:
        """Mean square of every expert's inputs for a token it sees, [E, I], none without data."""
        total = self._tensor(f"{module}.{projection}.diagonal")
        counts = self.counts(module)[:, None].float()
        pooled = total.sum(0) / counts.sum().clamp(min=1)
        return (total + SHRINKAGE * pooled) / (counts + SHRINKAGE)

    def share(self, module: str) -> torch.Tensor:
        """Share of every expert in what the module's down projections are fed with: [E]."""
        energy = self.diagonal(module, "down_proj").sum(-1)
        # Half a token for experts that were never chosen: another text may choose them.
        energy = energy * (self.counts(module) + 0.5)
        return energy / energy.sum()

    def statistics(self, module: str, expert: int, projection: str) -> torch.Tensor | None:
        """Second moments [I, I] of an expert's inputs, or None for a module that never ran.

        Draft stages do not run in a plain forward pass.
        """
        if module not in self.modules:
            return None
        key = f"{module}.{projection}"
        if self._last is None or self._last[0] != key:
            moment = self._tensor(f"{key}.moment")
            size = moment.diagonal().clamp(min=2.0**-126).rsqrt()
            self._last = key, moment * size[:, None] * size
        size = self.diagonal(module, projection)[expert].sqrt()
        return self._last[1] * size[:, None] * size


def token_batches(
    tokenizer: Any, path: str | Path, tokens: int = 65536, length: int = 512
) -> Iterator[torch.Tensor]:
    """Cut a text file into rows [1, length] int64 until `tokens` are reached."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"))["input_ids"][:tokens]
    if len(ids) < 2:
        raise ValueError(f"{path}: wanted a text to calibrate with, got {len(ids)} tokens")
    for start in range(0, len(ids), length):
        yield torch.tensor([ids[start : start + length]])


def calibrate(
    model: nn.Module,
    batches: Iterable[torch.Tensor],
    layers: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Run a model over token ids and gather what its routed experts are fed with.

    Args:
        model: a Dsv4 model; experts in any form, on disk too.
        batches: ids [B, S].
        layers: positions of the experts modules to observe, None for all.
        progress: called with the number of tokens passed.
    """
    prefix = "" if hasattr(model, "model") else "model."
    found = [(prefix + p, m) for p, m in model.named_modules() if isinstance(m, ExpertsBase)]
    chosen = found if layers is None else [found[i] for i in layers]
    observers = [_Observer(name, module) for name, module in chosen]
    done = 0
    with _watching(observers), torch.no_grad():
        for ids in batches:
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
            done += ids.numel()
            if progress is not None:
                progress(done)
    tensors: dict[str, torch.Tensor] = {}
    for observer in observers:
        if observer.counts.any():
            tensors |= observer.tensors()
    if not tensors:
        raise ValueError("wanted batches of token ids that reach routed experts, got none")
    return Calibration.of(tensors)


class _Observer:
    """Sums over what one experts module is fed with."""

    def __init__(self, name: str, module: ExpertsBase) -> None:
        self.name, self.module = name, module
        e, d, f = module.num_experts, module.hidden_size, module.intermediate_size
        self.moment = {p: torch.zeros(n, n) for p, n in zip(PROJECTIONS, (d, f), strict=True)}
        self.diagonal = {p: torch.zeros(e, n) for p, n in zip(PROJECTIONS, (d, f), strict=True)}
        self.counts = torch.zeros(e, dtype=torch.int64)
        self.sample = torch.zeros(0, d, dtype=torch.bfloat16)

    def inputs(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hear of hidden states [n, D], chosen experts [n, K] and their weights [n, K]."""
        x, index, weights = (t.detach() for t in args)
        here = index < self.module.num_experts
        x, count = x.float(), weights.float().square() * here
        self.moment["gate_up_proj"] += ((x * count.sum(1, keepdim=True)).T @ x).cpu()
        for k in range(index.shape[1]):
            at = index[here[:, k], k].cpu()
            part = (x.square() * count[:, k, None])[here[:, k]].cpu()
            self.diagonal["gate_up_proj"].index_add_(0, at, part)
            self.counts += at.bincount(minlength=len(self.counts))
        room = SAMPLE - len(self.sample)
        if room > 0:
            # A few of each batch, so that more than one document is heard.
            step = max(len(x) // 16, 1)
            self.sample = torch.cat((self.sample, x[::step][:room].bfloat16().cpu()))

    def activations(self, expert: int, u: torch.Tensor) -> None:
        """Hear of an expert's inputs of the down projection [m, F], routing weights in them."""
        u = u.detach().float()
        self.moment["down_proj"] += (u.T @ u).cpu()
        self.diagonal["down_proj"][expert] += u.square().sum(0).cpu()

    def open_expert(self, expert: int) -> tuple[Linear, Linear]:
        """Open an expert that tells what its second projection is fed with."""
        gate_up, down = type(self.module).open_expert(self.module, expert)

        def observed(u: torch.Tensor) -> torch.Tensor:
            self.activations(expert, u)
            return down(u)

        return gate_up, observed

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it under the names of the file."""
        found = {"counts": self.counts, "sample": self.sample}
        for p in PROJECTIONS:
            found |= {f"{p}.moment": self.moment[p], f"{p}.diagonal": self.diagonal[p]}
        return {f"{self.name}.{key}": tensor for key, tensor in found.items()}


@contextmanager
def _watching(observers: Sequence[_Observer]) -> Iterator[None]:
    """Let experts go one by one, through their observers."""
    handles = []
    try:
        for observer in observers:
            module = observer.module
            handles.append(module.register_forward_pre_hook(observer.inputs))
            # Attributes of the instance hide the class's methods until they are deleted.
            module.__dict__.update(
                open_expert=observer.open_expert,
                _by_kernel=lambda *args: None,
                _one_by_one=lambda *args, module=module: ExpertsBase._one_by_one(module, *args),
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
        for observer in observers:
            for name in ("open_expert", "_by_kernel", "_one_by_one"):
                observer.module.__dict__.pop(name, None)
