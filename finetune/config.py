# SPDX-License-Identifier: Apache-2.0
"""The run: everything that decides what a fine-tuning does, as one frozen record beside it."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from quantize.sizes import parse_size

from .files import write_text
from .targets import DEFAULT_PRESET, EXPERTS, get_preset

LossOn = Literal["answers", "all"]
Schedule = Literal["cosine", "constant", "linear"]
DType = Literal["auto", "float32", "bfloat16"]
HotScore = Literal["token", "gate"]
Gate = Literal["auto", "on", "off"]
LayerSchedule = Literal["ordinary", "layer-major"]
Objective = Literal["sft", "dpo", "kto", "orpo", "grpo"]
Optimizer = Literal[
    "adamw",
    "sgd",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "lion_8bit",
    "ademamix_8bit",
]
Long = Literal["cut", "split", "reject"]
OnBad = Literal["refuse", "skip"]
Thinking = Literal["auto", "always", "never"]

# Where a run keeps its settings, in its output directory.
RUN_FILE = "run.yaml"
# What may differ between a run and its continuation without changing a single update.
_FREE_ON_RESUME = (
    "output",
    "logging_steps",
    "save_steps",
    "keep_checkpoints",
    "report_to",
    "overfit_gate",
    "expert_memory",
    "engram_memory",
    "checkpoint_memory",
)


_CHOICES = {
    "long": Long,
    "on_bad": OnBad,
    "thinking": Thinking,
    "objective": Objective,
    "loss_on": LossOn,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "dtype": DType,
    "overfit_gate": Gate,
    "layer_schedule": LayerSchedule,
    "hot_score": HotScore,
}
_COUNTS = (
    "rank",
    "group_size",
    "max_new_tokens",
    "hot_tokens",
    "memory_rows",
    "max_length",
    "batch_size",
    "accumulation",
    "logging_steps",
    "keep_checkpoints",
)


@dataclass(frozen=True)
class RunConfig:
    """A fine-tuning run. Field names are the keys of `--config FILE.yaml`.

    Attributes:
        model: directory of the base model, plain or quantized.
        data: file or directory of records, see `finetune.sources`.
        output: directory of the adapter.
        objective: what is learned: texts and answers; preferences, see `finetune.preference`; or
            what rewards ask for, see `finetune.rewards`.
        beta: how strongly preferences hold to the reference; of orpo, weight of the odds ratio; of
            grpo, weight of the divergence from the base. None is 0.1, of grpo 0.04.
        group_size: answers that grpo draws to each question.
        max_new_tokens: of an answer that is drawn.
        temperature: at which it is drawn.
        preset: which modules get adapters, see `finetune.targets`.
        rank: r of attention and shared experts.
        alpha: LoRA alpha; None makes the scale 2.
        expert_rank: r of one routed expert; None is `max(2, round(rank / active experts))`.
        dropout: on the input of linear adapters, never of experts.
        hot_share: share of the routing that the experts with adapters cover, with presets on
            routed experts; None is all experts, and 0.5 with "hot-experts".
        hot_score: what is counted, "token" or "gate"; see `finetune.hot_experts`.
        hot_tokens: how many tokens of the data are counted at most.
        train_indexer: train the indexer too, by its own loss; see `finetune.indexer_training`.
        memory_rows: rows of each Engram layer that preset "memory" may write.
        memory_background: text or jsonl file of ordinary text, whose n-grams "memory" leaves alone.
        max_length: tokens per example.
        long: what becomes of longer ones: cut, split into several, or bad records.
        packing: several documents per row, each as if it were alone.
        loss_on: assistant answers and completions, or every token.
        thinking: which chats are written with their reasoning: those that have some, all, none.
        on_bad: bad records refuse the run before it starts, or are skipped and listed.
        eval_data: records held out, in a file of their own; eval_fraction has no effect then.
        eval_fraction: share of distinct records held out, chosen by content.
        drop_duplicates: train on the first only of records that are equal but for case and signs.
        drop_overlap: do not train on records that equal, or nearly, one held out.
        epochs: passes over the data, unless max_steps is given.
        max_steps: optimizer steps.
        batch_size: rows per forward pass.
        accumulation: forward passes per step.
        optimizer: see `finetune.optimizers`.
        learning_rate: at its peak.
        schedule: behind the warm-up.
        warmup_ratio: share of the steps in which the rate rises to its peak.
        lr_ratios: pattern of whole parameter names -> their share of the rate.
        lora_plus_ratio: how much faster the second half of each low-rank pair learns.
        max_grad_norm: longer gradients are scaled down to it.
        gradient_checkpointing: compute activations again on the way back.
        eval_steps: steps between evaluations; None is once per epoch.
        save_steps: steps between checkpoints; None is once per epoch.
        patience: evaluations without a better held-out loss that end the run; None is never.
        keep_best: end with the adapter of the best held-out loss.
        keep_checkpoints: the newest so many, and the best one.
        report_to: reporters of transformers by name, with commas between them, or "none".
        overfit_gate: learn one batch by heart first; "auto" before long runs.
        dtype: of the base model's plain weights; adapters are float32 in any case.
        expert_memory: how much of the experts may be resident, e.g. "2GiB".
        engram_memory: the same for Engram tables.
        layer_schedule: "layer-major" passes all micro-batches of a step through a layer before the
            next, so that experts are read once a direction; see `finetune.layer_major`.
        checkpoint_memory: host memory of its stream checkpoints, e.g. "64GiB"; None is half of
            what is free. Over it, groups of layers are computed again.
    """

    model: str
    data: str
    output: str
    objective: Objective = "sft"
    beta: float | None = None
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    preset: str = DEFAULT_PRESET
    rank: int = 32
    alpha: float | None = None
    expert_rank: int | None = None
    dropout: float = 0.0
    hot_share: float | None = None
    hot_score: HotScore = "token"
    hot_tokens: int = 1 << 17
    train_indexer: bool = False
    memory_rows: int = 4096
    memory_background: str | None = None
    max_length: int = 2048
    packing: bool = False
    long: Long = "cut"
    loss_on: LossOn = "answers"
    thinking: Thinking = "auto"
    on_bad: OnBad = "refuse"
    eval_data: str | None = None
    eval_fraction: float = 0.1
    drop_duplicates: bool = False
    drop_overlap: bool = False
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    optimizer: Optimizer = "adamw"
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03
    lr_ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    lora_plus_ratio: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    patience: int | None = None
    keep_best: bool = True
    keep_checkpoints: int = 2
    report_to: str = "tensorboard"
    overfit_gate: Gate = "auto"
    dtype: DType = "auto"
    expert_memory: str | None = None
    engram_memory: str | None = None
    layer_schedule: LayerSchedule = "ordinary"
    checkpoint_memory: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "float" in str(field.type):
                object.__setattr__(self, field.name, _read_number(getattr(self, field.name)))
            _check_type(field.name, getattr(self, field.name), field.type)
        _check_preset(self)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name}: wanted one of {', '.join(get_args(allowed))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in _COUNTS:
            _check_range(name, getattr(self, name), low=1)
        for name in ("expert_rank", "max_steps", "eval_steps", "save_steps", "patience"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), low=1)
        for name in ("dropout", "eval_fraction"):
            _check_range(name, getattr(self, name), low=0, below=1)
        _check_range("warmup_ratio", self.warmup_ratio, low=0, below=1)
        _check_range("weight_decay", self.weight_decay, low=0)
        above = ["learning_rate", "epochs", "max_grad_norm", "lora_plus_ratio", "temperature"]
        for name in above if self.objective == "grpo" else [*above, "beta"]:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: wanted more than 0, got {value}")
        _check_ratios(self.lr_ratios)
        self._check_groups()
        self._check_schedule()

    @property
    def strength(self) -> float:
        """`beta`, or what it is where nothing was said."""
        usual = 0.04 if self.objective == "grpo" else 0.1
        return usual if self.beta is None else self.beta

    def _check_groups(self) -> None:
        """Every step of grpo learns from whole groups."""
        if self.objective != "grpo":
            return
        _check_range("beta", self.strength, low=0)
        _check_range("group_size", self.group_size, low=2)
        rows = self.batch_size * self.accumulation
        if rows % self.group_size:
            raise ValueError(
                f"group_size: wanted a divisor of batch_size * accumulation ({rows}), got "
                f"{self.group_size}"
            )
        if self.overfit_gate == "on":
            raise ValueError(
                "overfit_gate: grpo draws its answers anew; wanted auto or off, got on"
            )

    def _check_schedule(self) -> None:
        if self.checkpoint_memory is not None:
            parse_size(self.checkpoint_memory)
        if self.layer_schedule == "ordinary":
            return
        if self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: layer-major keeps and computes again what it needs by "
                "itself (checkpoint_memory); leave gradient_checkpointing off"
            )
        if self.train_indexer:
            raise ValueError(
                "train_indexer: layer-major does not run the indexer's loss; use layer_schedule "
                "ordinary"
            )
        if self.objective != "sft":
            raise ValueError(
                f"layer_schedule: layer-major knows the loss of sft alone, got {self.objective}; "
                "use ordinary"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Build from plain values.

        Raises:
            ValueError: unknown or missing keys, named.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"run config: unknown keys {', '.join(unknown)}; wanted some of "
                f"{', '.join(sorted(known))}"
            )
        missing = [name for name in ("model", "data", "output") if name not in values]
        if missing:
            raise ValueError(f"run config: wanted {', '.join(missing)}, got none")
        return cls(**values)

    @classmethod
    def from_yaml(cls, *paths: str | Path, **overrides: object) -> "RunConfig":
        """Read YAML files; later ones win, and `overrides` that are not None win over all."""
        values = read_yaml(*paths)
        return cls.from_dict(values | {k: v for k, v in overrides.items() if v is not None})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write as YAML, in field order."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    def check_continues(self, earlier: "RunConfig") -> None:
        """Refuse to continue `earlier` with other settings than its own.

        Raises:
            ValueError: names each field that differs, with both values.
        """
        differ = [
            f"{name} {old!r} -> {new!r}"
            for (name, old), new in zip(
                earlier.to_dict().items(), self.to_dict().values(), strict=True
            )
            if old != new and name not in _FREE_ON_RESUME
        ]
        if differ:
            raise ValueError(
                f"resume: the run in {earlier.output} had other settings ({'; '.join(differ)}); "
                "give the same, or start anew in another directory"
            )


def read_yaml(*paths: str | Path) -> dict[str, Any]:
    """Read YAML mappings; the keys of later ones win.

    Raises:
        ValueError: not YAML, or not a mapping.
    """
    values: dict[str, Any] = {}
    for path in paths:
        values |= _read_mapping(path)
    return values


def _read_mapping(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: wanted YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted a mapping of settings, got {type(values).__name__}")
    return values


def _read_number(value: Any) -> Any:
    """The number that a text is, also in a mapping: YAML 1.1 reads 1e-4, without a point, as text.

    Whatever else comes is returned as it is, to be judged.
    """
    if isinstance(value, dict):
        return {key: _read_number(item) for key, item in value.items()}
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _check_type(name: str, value: object, annotation: object) -> None:
    """YAML types hold: a number may be given where a float is meant, nothing else is bent."""
    if annotation in (*_CHOICES.values(), str):
        good = isinstance(value, str)
    elif annotation == dict[str, float]:
        good = isinstance(value, dict)
    elif annotation is bool:
        good = isinstance(value, bool)
    else:
        optional = value is None and "None" in str(annotation)
        number = int | float if "float" in str(annotation) else int
        kind = str if "str" in str(annotation) else number
        good = optional or (isinstance(value, kind) and not isinstance(value, bool))
    if not good:
        wanted = getattr(annotation, "__name__", str(annotation))
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")


def _check_ratios(ratios: dict[str, float]) -> None:
    for pattern, ratio in ratios.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"lr_ratios: wanted patterns of names, got {pattern!r}: {error}"
            ) from error
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio > 0:
            raise ValueError(f"lr_ratios: wanted numbers above 0, got {ratio!r} for {pattern}")


def _check_preset(run: RunConfig) -> None:
    """What a preset is asked for must be in it."""
    preset = get_preset(run.preset)
    own = preset.weights or run.preset == "memory"
    if run.objective != "sft" and (own or run.train_indexer):
        what = f"preset {run.preset!r}" if own else "train_indexer"
        raise ValueError(f"{what}: wanted objective sft, got {run.objective}")
    if run.hot_share is None:
        return
    if EXPERTS not in preset.patterns:
        raise ValueError(f"hot_share: preset {run.preset!r} has no adapters on routed experts")
    if not 0 < run.hot_share <= 1:
        raise ValueError(f"hot_share: wanted more than 0 and at most 1, got {run.hot_share}")


def _check_range(name: str, value: float, *, low: float, below: float | None = None) -> None:
    if value < low or (below is not None and value >= below):
        wanted = f"at least {low}" + (f" and less than {below}" if below is not None else "")
        raise ValueError(f"{name}: wanted {wanted}, got {value}")
