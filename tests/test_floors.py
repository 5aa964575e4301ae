"""The house's floors: a module imports from lower floors only, and folders on one floor do not import each other."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "perdure"
FLOORS = {
    "core": 0, "models": 1, "data": 1, "ops": 1, "training": 2, "synthesis": 2, "methods": 3, "engine": 4,
    "benchmarks": 5, "report": 5, "launch": 6, "serve": 7, "cli": 8, "__main__.py": 9,
}  # fmt: skip


def imported(path: Path) -> list[str]:
    """The package's modules that a file imports, as dotted names without ``perdure.``."""
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module.count(".") < 2:
                names = [f"{node.module}.{a.name}" for a in node.names]
        out += [n.removeprefix("perdure.") for n in names if n.startswith("perdure.")]
    return out


def violations(path: Path, root: Path = SRC) -> list[str]:
    here = path.relative_to(root).parts[0]  # a folder, or a module above all of them
    floor = FLOORS.get(here, 7)
    wrong = []
    for name in imported(path):
        there = name.split(".")[0]
        upward = FLOORS.get(there, 7) > floor
        beside = there in FLOORS and FLOORS[there] == floor and there != here
        free = path.stem in ("__init__", "base") or name.startswith("methods.base")
        method = here == there == "methods" and not free
        engine = here == "engine" and there == "methods" and not name.startswith("methods.base")
        if upward or beside or method or engine:
            wrong.append(f"{path.relative_to(root)} imports {name}")
    return wrong


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_downstairs(path: Path) -> None:
    assert violations(path) == []


def test_every_folder_has_a_floor() -> None:
    folders = {p.name for p in SRC.iterdir() if p.is_dir() and p.name not in ("__pycache__", "presets")}
    assert folders <= set(FLOORS)


def test_only_fit_trains() -> None:
    calls = {"backward", "step"}
    for path in sorted(SRC.rglob("*.py")):
        if path.name == "fit.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls:
                owner = ast.unparse(node.func.value)
                assert owner.split(".")[-1] in ("learn", "watcher"), f"{path}: {owner}.{node.func.attr}()"


def test_the_test_sees_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "core" / "would_be.py"
    wrong.parent.mkdir()
    wrong.write_text("from perdure.methods.base import Method\n")
    assert violations(wrong, tmp_path) == ["core/would_be.py imports methods.base"]
