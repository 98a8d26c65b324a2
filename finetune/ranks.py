# SPDX-License-Identifier: Apache-2.0
"""A run on several processes (ranks): who writes, what is summed, and how all stop together.

accelerate or torchrun starts the processes and torch joins them. Each of them prepares the same
data and the same model; the rows of a step are dealt out, and gradients are summed. With one
process everything here does nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .config import RunConfig
from .interruption import StopSignal
from .sharded import check_shards

T = TypeVar("T")
# Settings that want one process, and why.
_ALONE: dict[str, tuple[object, str]] = {
    "layer_schedule": (
        "layer-major",
        "its gradients come layer by layer and are not added up over processes",
    ),
    "train_indexer": (True, "its loss is a mean over the queries of one process"),
    "objective": ("grpo", "answers that several processes draw were never compared with one's"),
}


def join_ranks() -> None:
    """Join the processes that a launcher started, if it did; gloo where there is no GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.accelerator.is_available())


def leave_ranks() -> None:
    """Part from the other processes, at a good end: torch warns of those that do not."""
    if _joined():
        dist.destroy_process_group()


def num_ranks() -> int:
    return dist.get_world_size() if _joined() else 1


def own_rank() -> int:
    return dist.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return own_rank() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where tensors must lie that processes exchange."""
    kind = torch.accelerator.current_accelerator() if dist.get_backend() != "gloo" else None
    return torch.device("cpu") if kind is None else kind


@contextmanager
def together() -> Iterator[None]:
    """What one process cannot do, none goes on from: its error is raised in all of them.

    Inside the block no process may wait for another.

    Raises:
        OSError: in the other processes, whatever the kind was; names the process.
    """
    error: Exception | None = None
    try:
        yield
    except (OSError, ValueError, NotImplementedError, SafetensorError) as caught:
        error = caught
    found = gather(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, reason in enumerate(found):
        if reason is not None:
            raise OSError(f"process {rank} of {len(found)}: {reason}")


def gather(value: T) -> list[T]:
    """A small plain value of every process, in all of them."""
    if num_ranks() == 1:
        return [value]
    found: list[T] = [value] * num_ranks()
    dist.all_gather_object(found, value)
    return found


def from_first(call: Callable[[], T]) -> T:
    """What the first process finds, in all of them; its error likewise."""
    found: list[T] = []
    with together():
        if is_first():
            found.append(call())
    return gather(found)[0][0]


def check_same(value: object, what: str) -> None:
    """Compare a value between processes.

    Raises:
        ValueError: it differs; all of them raise.
    """
    found = gather(value)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"{what}: wanted the same in every process, got {found[0]} in process 0 and {other}"
                f" in process {rank}; give all of them the same files"
            )


def sum_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add up a tensor over processes; it is on the CPU, in its dtype."""
    values = values.detach()
    if num_ranks() == 1:
        return values.cpu()
    sent = values.to(_device(), copy=True)
    dist.all_reduce(sent)
    return sent.cpu()


def deal(items: Sequence[T]) -> list[T]:
    """The items of this process; every item is in one process, and some may have one less."""
    return list(items[own_rank() :: num_ranks()])


def agree_to_stop(stop: StopSignal) -> None:
    """A signal that any process got stops all of them at the same step."""
    if num_ranks() > 1:
        signal = torch.tensor([stop.signum or 0], device=_device())
        dist.all_reduce(signal, dist.ReduceOp.MAX)
        stop.signum = int(signal) or None


def vary_dropout(seed: int) -> None:
    """Give each process its own random numbers; the first keeps those of a run alone."""
    if not is_first():
        torch.manual_seed(seed + own_rank())


def leave_frozen(model: nn.Module) -> None:
    """Let data parallelism send what trains, and nothing else.

    The rest is the same in every process, as large as the model, and may be of a dtype that no
    backend sends.
    """
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    names += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def check_ranks(config: RunConfig) -> None:
    """Refuse what several processes cannot do.

    Raises:
        NotImplementedError: names the setting, and why.
    """
    check_shards(config)
    count = num_ranks()
    if count == 1:
        return
    for name, (value, why) in _ALONE.items():
        if getattr(config, name) == value:
            plain = RunConfig.__dataclass_fields__[name].default
            raise NotImplementedError(
                f"{name} {value}: wanted one process, got {count}; {why}. Start it without a "
                f"launcher, or leave it {plain}"
            )
