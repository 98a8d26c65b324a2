# SPDX-License-Identifier: Apache-2.0
"""The documents say what is there: the file tree, the make targets, links, no machine's paths."""

import re
from pathlib import Path, PurePosixPath

import pytest

# Each of these folders has a line in the README's tree, with all that lies directly in it.
PACKAGES = ("modeling_dsv4", "quantize", "finetune")
LISTED = (*PACKAGES, "tests", "examples", "benchmarks", "models", "docs")
HIDDEN = ("__init__.py", "py.typed")


def tree_of_readme(text: str) -> dict[str, set[str]]:
    """Folder -> names, from the fenced block whose lines are `folder/  name name …`.

    An indented line goes on with the folder above it; a module's `.py` is left out.
    """
    block = next(b for b in re.findall(r"```text\n(.*?)```", text, re.S) if "modeling_dsv4/" in b)
    tree: dict[str, set[str]] = {}
    for line in block.splitlines():
        words = line.split()
        if line and not line[0].isspace():
            folder = words.pop(0).rstrip("/")
            tree[folder] = set()
        tree[folder].update(words)
    return tree


def tree_of_files(files: list[str]) -> dict[str, set[str]]:
    """The same from the files themselves; a package's folder has a line of its own."""
    tree: dict[str, set[str]] = {}
    for path in map(PurePosixPath, files):
        if path.parts[0] not in LISTED or path.name in HIDDEN:
            continue
        if path.parts[0] in PACKAGES or len(path.parts) == 2:
            folder, name = path.parent.as_posix(), path.name.removesuffix(".py")
        else:
            folder, name = path.parts[0], f"{path.parts[1]}/"
        tree.setdefault(folder, set()).add(name)
    return tree


def folders_of(files: list[str]) -> set[str]:
    tops = {path.split("/")[0] for path in files if "/" in path}
    return {top for top in tops if not top.startswith(".")}


def test_the_tree_in_the_readme_equals_the_files(root: Path, project_files: list[str]) -> None:
    written = tree_of_readme((root / "README.md").read_text())
    actual = tree_of_files(project_files)
    wrong = [
        f"{folder}/  {' '.join(sorted(names))}"
        for folder, names in actual.items()
        if written.get(folder) != names
    ]
    assert not wrong, "these lines of the README's tree should read:\n" + "\n".join(wrong)


def test_the_tree_in_the_readme_names_every_folder(root: Path, project_files: list[str]) -> None:
    written = tree_of_readme((root / "README.md").read_text())
    assert {folder.split("/")[0] for folder in written} == folders_of(project_files)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_that_a_document_names_exists(root: Path, document: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (root / "Makefile").read_text(), re.M))
    text = (root / document).read_text()
    code = re.findall(r"```.*?```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    named = {word for part in code for word in re.findall(r"\bmake ([a-z][a-z-]*)", part)}
    assert named
    assert named <= targets


def test_every_relative_link_leads_to_a_file(root: Path, project_files: list[str]) -> None:
    for name in project_files:
        if not name.endswith(".md") or name.startswith(("tests/golden/", "models/")):
            continue
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (root / name).read_text()):
            assert ((root / name).parent / link).exists(), f"{name} links to {link}"


def test_every_test_that_the_page_on_correctness_names_exists(root: Path) -> None:
    lines = (root / "docs" / "correctness.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and "::" in line]
    assert len(rows) > 80
    for row in rows:
        what, tests, broken = (cell.strip() for cell in row.strip("|").split(" | "))
        assert what and broken, row
        for name in tests.split("; "):
            file, function = name.strip("`").split("::")
            source = (root / "tests" / file).read_text()
            assert f"\ndef {function}(" in source, f"docs/correctness.md names {name}"


def test_no_file_knows_the_machine_it_was_written_on(root: Path, project_files: list[str]) -> None:
    machine = re.compile(rb"(?<![\w.~)}])/(?:work|root|home|Users|tmp|opt)/[\w.-]+")
    found = []
    for name in project_files:
        content = (root / name).read_bytes()
        if b"\0" in content[:4096] or len(content) > 2**22:
            continue
        found += [f"{name}: {hit.decode()}" for hit in machine.findall(content)]
    assert not found
