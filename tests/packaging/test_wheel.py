# SPDX-License-Identifier: Apache-2.0
"""What pip installs: three packages, typed, with two programs."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {"modeling_dsv4", "quantize", "finetune"}
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheel')"


@pytest.fixture(scope="module")
def wheel_names(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names inside a wheel built from a copy of the repository's folders."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    skip = shutil.ignore_patterns("__pycache__", "golden", "*.safetensors")
    for name in ("modeling_dsv4", "quantize", "finetune", "tests", "examples", "docs"):
        shutil.copytree(root / name, copy / name, ignore=skip)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "wheel").glob("dsv4-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_exactly_three_packages(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


def test_the_wheel_holds_every_module_of_the_three_packages(
    wheel_names: list[str], project_files: list[str]
) -> None:
    ours = {name for name in project_files if name.split("/")[0] in PACKAGES}
    assert {name for name in ours if name.endswith(".py")} <= set(wheel_names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel_names)
    assert {name for name in ours if name.endswith((".c", ".jinja"))} <= set(wheel_names)


def test_each_program_names_a_function_that_exists(pyproject: dict[str, Any]) -> None:
    scripts = pyproject["project"]["scripts"]
    assert set(scripts) == {"dsv4-quantize", "dsv4-run", "dsv4-finetune"}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), target
