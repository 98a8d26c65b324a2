# SPDX-License-Identifier: Apache-2.0
"""Each numbered example runs as it stands, and what it prints is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# Example -> the printed measurements that must stay below a limit; the last line is one of them.
LIMITS = {
    "01_from_pretrained": {
        "largest difference between packed and expanded weights": 5e-4,
        "largest error against the official code": 5e-4,
    },
    "02_packed_batch": {
        "largest difference of packed documents from each alone": 5e-4,
        "largest difference of padded documents from each alone": 5e-4,
    },
    "03_prompt_cache_chunks": {
        "answers that the cache changed": 0,
        "largest difference between cached and fresh logits": 5e-4,
    },
    "04_quantize_and_offload": {"logits that the disk changed": 0},
    "05_lora": {
        "last loss over first loss": 0.9,
        "largest difference between attached and merged": 5e-4,
    },
    "06_parallel": {"largest difference between 2 processes and one": 5e-4},
    "07_memory_adapter": {
        "loss on the facts": 2.0,
        "logits of ordinary text that changed": 0,
    },
}


def read_numbers(output: str) -> dict[str, float]:
    """Every line `name: number` of a program's output, in order."""
    found = re.findall(r"^([^:\n]+): ([-+.\de]+)$", output, re.M)
    return {name: float(number) for name, number in found}


def test_every_numbered_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("[0-9]*.py")} == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_an_example_fits_a_page(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("name", LIMITS)
def test_an_example_ends_with_a_fact_that_holds(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = read_numbers(done.stdout)
    last = done.stdout.splitlines()[-1]
    assert any(last.startswith(f"{fact}: ") for fact in LIMITS[name]), last
    for fact, limit in LIMITS[name].items():
        assert 0 <= numbers[fact] <= limit, f"{fact}: {numbers[fact]}"
    assert list(tmp_path.iterdir()) == []
