# SPDX-License-Identifier: Apache-2.0
"""What fits where, from arithmetic alone: bytes of a model, tiers of a machine, a ceiling of speed.

One token reads the dense part, and of every layer a few experts. With R the bytes of those experts
and D those of the dense part, a share h of R lies in the fast memory and the rest crosses a link:

    t = (1 - h) R / link + (h R + D) / fast

Nothing else is counted, so no program reaches these rates; they say which limit binds.
"""

from dataclasses import dataclass

from .sizes import format_size


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's parts.

    Attributes:
        expert: one routed expert.
        num_experts: routed experts of all layers, drafts not counted.
        experts_per_token: of these, read for one token.
        dense: read for every token.
        embedding: the embedding table, of which a token reads one row.
        lookup: other tables of which a token reads a few rows (Engram, hash routing).
        draft: draft heads, not used in plain decoding.
        vision: vision weights, carried and not used.
        cache: keys and values of the planned context.
    """

    expert: int
    num_experts: int
    experts_per_token: int
    dense: int
    embedding: int = 0
    lookup: int = 0
    draft: int = 0
    vision: int = 0
    cache: int = 0

    @property
    def experts(self) -> int:
        """Bytes of all routed experts."""
        return self.expert * self.num_experts

    @property
    def routed(self) -> int:
        """Bytes of the experts that one token reads."""
        return self.expert * self.experts_per_token


@dataclass(frozen=True)
class Machine:
    """Memory in bytes and links in bytes per second; the rates are assumed unless measured."""

    ram: int
    vram: int = 0
    disk_rate: int = 7 * 10**9
    link_rate: int = 55 * 10**9
    ram_rate: int = 80 * 10**9
    vram_rate: int = 1500 * 10**9
    workspace: int = 4 * 10**9

    def __post_init__(self) -> None:
        for name in ("disk_rate", "link_rate", "ram_rate", "vram_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: wanted more than 0 bytes/s, got {getattr(self, name)}")


@dataclass(frozen=True)
class Plan:
    """Where a model's parts go on a machine, and the speed that follows.

    Attributes:
        sizes, machine: what was asked.
        experts_in: experts by tier, "vram", "ram", "disk".
        lookup_in: tier of the lookup tables.
        problem: what does not fit, None if the model runs.
        serial: derived tokens/s if all transfers wait for each other.
        overlapped: derived tokens/s if the slowest hides the others.
        limit: which link binds.
    """

    sizes: ModelSizes
    machine: Machine
    experts_in: dict[str, int]
    lookup_in: str
    problem: str | None
    serial: float
    overlapped: float
    limit: str

    @property
    def expert_memory(self) -> int:
        """Bytes of experts in host memory: what to give `from_pretrained` as `expert_memory`.

        All of them where they fit into the memory of the GPU.
        """
        if self.experts_in["vram"] == self.sizes.num_experts:
            return self.sizes.experts
        return self.sizes.expert * self.experts_in["ram"]


def ceiling(sizes: ModelSizes, hit_rate: float, link_rate: float, fast_rate: float) -> float:
    """Tokens per second of the equation above, with `hit_rate` of R in the fast memory."""
    if not 0 <= hit_rate <= 1:
        raise ValueError(f"hit_rate: wanted 0 to 1, got {hit_rate}")
    slow = (1 - hit_rate) * sizes.routed / link_rate
    return 1 / (slow + (hit_rate * sizes.routed + sizes.dense) / fast_rate)


def place(sizes: ModelSizes, machine: Machine) -> Plan:
    """Fill the fastest tier first: dense part and cache, then experts; the rest stays on disk.

    A token is taken to want every expert equally often: the resident share is the hit rate. Real
    routing is uneven, and a cache does better than this.
    """
    fast = machine.vram or machine.ram
    left = fast - _reserve(fast, machine) - sizes.dense - sizes.cache
    ram = machine.ram - _reserve(machine.ram, machine) if machine.vram else left
    # One row a token: the table can stay in host memory.
    ram -= sizes.embedding
    problem = _shortfall(sizes, machine)
    lookup_in = "ram" if sizes.lookup <= ram // 2 else "disk"
    if lookup_in == "ram":
        ram -= sizes.lookup
    count, experts_in = sizes.num_experts, {"vram": 0, "ram": 0, "disk": 0}
    for tier, room in (("vram", left if machine.vram else 0), ("ram", ram)):
        experts_in[tier] = min(count, max(0, room) // sizes.expert) if sizes.expert else count
        count -= experts_in[tier]
    experts_in["disk"] = count
    seconds = _seconds(sizes, machine, experts_in)
    limit = max(seconds, key=seconds.__getitem__)
    return Plan(
        sizes, machine, experts_in, lookup_in, problem,
        serial=1 / sum(seconds.values()), overlapped=1 / seconds[limit], limit=limit,
    )  # fmt: skip


def _reserve(tier: int, machine: Machine) -> int:
    """Memory of a tier that is left to activations and everything else that runs."""
    return min(machine.workspace, tier // 8)


def _in_ram(sizes: ModelSizes, machine: Machine) -> int:
    """Bytes that host memory holds at least."""
    # An expert passes through host memory on its way from the disk.
    dense = 0 if machine.vram else sizes.dense + sizes.cache
    return sizes.embedding + sizes.expert + dense


def _shortfall(sizes: ModelSizes, machine: Machine) -> str | None:
    """Name the parts that do not fit, and the memory that would hold them."""
    tiers = [("RAM", machine.ram, _in_ram(sizes, machine))]
    if machine.vram:
        tiers.insert(0, ("VRAM", machine.vram, sizes.dense + sizes.cache))
    for tier, have, parts in tiers:
        wanted = min(parts + machine.workspace, -(-8 * parts // 7))
        if have < wanted:
            what = "the embedding and one expert"
            if tier == "VRAM" or not machine.vram:
                what = "the part read for every token and its cache"
            return f"{what} want {format_size(wanted)} of {tier}, got {format_size(have)}"
    return None


def _seconds(sizes: ModelSizes, machine: Machine, experts_in: dict[str, int]) -> dict[str, float]:
    """Seconds per token by link."""
    routed = {k: sizes.routed * n / max(sizes.num_experts, 1) for k, n in experts_in.items()}
    if not machine.vram:
        return {
            "ram": (routed["ram"] + sizes.dense) / machine.ram_rate,
            "disk": routed["disk"] / machine.disk_rate,
        }
    return {
        "vram": (routed["vram"] + sizes.dense) / machine.vram_rate,
        "link": routed["ram"] / machine.link_rate,
        "disk": routed["disk"] / machine.disk_rate,
    }
