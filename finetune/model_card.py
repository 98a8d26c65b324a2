# SPDX-License-Identifier: Apache-2.0
"""The README.md of an adapter: what PEFT and the Hub read of it, and what people do.

Written with huggingface_hub's own classes; nothing is sent anywhere.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .files import write_text

CARD = "README.md"
# A name that the Hub accepts: for a directory, its own.
_NAME = re.compile(r"[^\w.-]+")


def hub_name(path: str) -> str:
    """A base's name: OWNER/NAME as it is, a directory by its last part."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists():
        return path
    return _NAME.sub("-", Path(path).name).strip("-.") or "base"


def model_card(
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    facts: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Describe an adapter.

    Args:
        config: settings of its run.
        result: what the run measured.
        facts: of `facts.collect_facts`.
        evaluation: what eval.json holds.
    """
    base, data = str(config["model"]), [Path(f["name"]).stem for f in facts["data"]]
    name = _NAME.sub("-", Path(str(config["output"])).name).strip("-.") or "adapter"
    card = ModelCardData(
        base_model=hub_name(base),
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[
            "dsv4",
            "lora",
            str(config.get("preset", "all")),
            f"base_model:adapter:{hub_name(base)}",
        ],
        datasets=data,
        model_name=name,
        eval_results=_eval_results(data[0] if data else "data", result, evaluation),
    )
    return ModelCard(f"---\n{card.to_yaml()}\n---\n\n{_text(name, base, config, result, facts)}")


def write_card(directory: str | Path, card: ModelCard) -> None:
    """Put the card beside the adapter, in place of the empty one that PEFT writes."""
    write_text(Path(directory, CARD), str(card))


def _eval_results(
    data: str, result: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> list[EvalResult] | None:
    found = []

    def add(kind: str, name: str, value: float) -> None:
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=data,
                dataset_name=data,
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
            )
        )

    if result.get("held_out_loss_after") is not None:
        add("loss", "held-out loss", result["held_out_loss_after"])
    for measure in (evaluation or {}).get("measures", ()):
        if measure["after"] is not None:
            kind = "accuracy" if measure["name"] in ("exact", "regex", "choice") else "loss"
            kind = "perplexity" if "perplexity" in measure["name"] else kind
            add(kind, measure["name"].replace("_", " "), measure["after"])
    return found or None


def _text(
    name: str,
    base: str,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> str:
    found = {
        word: (result.get(f"held_out_{word}_before"), result.get(f"held_out_{word}_after"))
        for word in ("loss", "margin", "reward")
    }
    word = next((word for word, (_, after) in found.items() if after is not None), "loss")
    before, after = found[word]
    loss = "nothing was held out" if after is None else f"{before:.4f} before, {after:.4f} after"
    files = "\n".join(f"| {f['name']} | `{f['sha256']}` |" for f in _files(facts))
    steps = f"{result['steps']:,} steps, {result['seconds']:,.0f} s"
    return f"""# {name}

A LoRA adapter for `{hub_name(base)}` (base identity `{facts["base"]["identity"]}`), preset
`{config.get("preset")}`, rank {config.get("rank")}: {result["trained_parameters"]:,} parameters.

```python
import finetune  # lets PEFT serve grouped projections, routed experts and packed weights
from modeling_dsv4 import Dsv4ForCausalLM
from peft import PeftModel

model = PeftModel.from_pretrained(Dsv4ForCausalLM.from_pretrained("BASE"), "ADAPTER")
```

| | |
|---|---|
| held-out {word} | {loss} |
| training | {steps}, peak learning rate {config.get("learning_rate")} |
| documents | {_count(result, "train_data")} trained, {_count(result, "held_out_data")} held out |
| command | `{facts["command"]}` |
| versions | {", ".join(f"{k} {v}" for k, v in facts["versions"].items())} |

`report.html` beside this file has curves, data, settings and the machine.

| file | sha256 |
|---|---|
{files}
"""


def _count(result: Mapping[str, Any], key: str) -> str:
    data = result.get(key) or {}
    return f"{data.get('examples', 0):,} ({data.get('tokens', 0):,} tokens)"


def _files(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        f
        for f in (*facts["data"], *facts.get("eval_data", ()), *facts["adapter"])
        if f["sha256"] is not None
    ]
