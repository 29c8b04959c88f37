"""The layers of the house: who may import whom. Imports inside functions count; those for type checkers alone do not.

What a registry looks up by its name (`halfplate.registry`, `halfplate.registration`) is not an import and does not count.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import halfplate

ROOT = Path(halfplate.__file__).parent
# Lowest first: what stands in a row imports from the rows above it in this list only, and not from its own row.
# A folder stands for all that is in it; the file of a module in `halfplate/` stands for itself.
LAYERS = (
    "defaults effort errors json_numbers plain_text plain_yaml processor recipes registration version",
    "arguments device dtypes headroom limits pattern precision recipe_values registry statistics storage",
    "formats",
    "kernels",
    "models",
    "engines solvers telemetry transforms",
    "calibration methods",
    "allocation runtime",
    "adapters recipe",
    "job",
    "checkpoint",
    "evaluation exports planning",
    "recovery report",
    "budgets",
    "compression",
    "integrations serving sweeps verbs",
    "halfplate",  # the public names
    "cli",
    "__main__",
)
# Imports that break a rule, and why each may.
EXCEPTIONS: dict[tuple[str, str], str] = {}
VERBS = {name for name in halfplate.__all__ if name.islower() and not name.startswith("_")}


def name_of(path: Path, root: Path) -> str:
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(node: ast.AST, types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports below `node`; without `types`, not those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING") and not types:
            for other in child.orelse:
                yield from statements(ast.Module([other], []), types)
        else:
            yield from statements(child, types)


@cache
def imports_of(root: Path) -> dict[str, set[str]]:
    """The modules of the package in `root`, each with those that it imports."""
    files = {name_of(path, root): path for path in root.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        targets: set[str] = set()
        # The package itself finds its public names when they are asked for; what it declares to type checkers is what it finds.
        for statement in statements(ast.parse(path.read_text(encoding="utf-8")), types=module == root.name):
            if isinstance(statement, ast.Import):
                targets |= {alias.name for alias in statement.names}
            else:
                assert not statement.level, f"{module} line {statement.lineno}: write imports in full"
                inside = {f"{statement.module}.{alias.name}" for alias in statement.names}
                targets |= {name if name in files else str(statement.module) for name in inside}
        found[module] = (targets & files.keys()) - {module}
    return found


def without_exceptions(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    return {name: {to for to in targets if (name, to) not in EXCEPTIONS} for name, targets in imports.items()}


def grouped(imports: Mapping[str, set[str]], group: Callable[[str], str]) -> dict[str, set[str]]:
    """The imports between groups of modules."""
    found: dict[str, set[str]] = {}
    for name, targets in imports.items():
        found.setdefault(group(name), set()).update(map(group, targets))
    return {name: targets - {name} for name, targets in found.items()}


def cycle(imports: Mapping[str, set[str]]) -> list[str]:
    """A circle of modules, each imported by the next; [] if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def folder(name: str) -> str:
    """The folder of a module; a file in `halfplate/` stands for itself."""
    inner = name.split(".")[1:]
    return name if len(inner) < 2 or (ROOT / Path(*inner)).is_dir() else name.rpartition(".")[0]


def unit(name: str) -> str:
    """The top folder or the file that a row of LAYERS names."""
    _, *inner = name.split(".")
    return inner[0] if inner else name


def test_no_files_import_each_other():
    assert cycle(without_exceptions(imports_of(ROOT))) == []


def test_no_folders_import_each_other():
    assert cycle(grouped(without_exceptions(imports_of(ROOT)), folder)) == []


def test_every_import_goes_to_a_lower_layer():
    rows = {name: number for number, row in enumerate(LAYERS) for name in row.split()}
    imports = without_exceptions(imports_of(ROOT))
    assert rows.keys() == set(map(unit, imports)), "LAYERS names what is there, no more and no less"
    upward = [
        f"{name} imports {to}"
        for name, targets in imports.items()
        for to in targets
        if unit(name) != unit(to) and rows[unit(to)] >= rows[unit(name)]
    ]
    assert upward == []


def test_the_page_on_architecture_lists_the_folders_from_low_to_high():
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    rows = {name: number for number, row in enumerate(LAYERS) for name in row.split()}
    assert set(listed) == {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"recipes"}
    assert [rows[name] for name in listed] == sorted(rows[name] for name in listed)
    for name, target in re.findall(r"`([A-Z]+)`, `([\w/]+\.py)`", page):
        assert re.search(rf"^{name}: Registry\[", (ROOT / target).read_text(encoding="utf-8"), re.MULTILINE), name


def test_every_exception_is_needed():
    """It stands for an import that is there, and that breaks a rule."""
    imports = imports_of(ROOT)
    allowed = without_exceptions(imports)
    for name, to in EXCEPTIONS:
        assert to in imports[name], f"{name} does not import {to} any more; take the exception out"
        with_it = allowed | {name: allowed[name] | {to}}
        assert cycle(with_it) or cycle(grouped(with_it, folder)), f"{name} may import {to}; take the exception out"


def test_the_command_line_calls_the_public_verbs():
    """It takes the verbs from `halfplate`, as everyone does, and nothing that lies behind them."""
    past = [
        f"{name} imports {to}"
        for name, targets in imports_of(ROOT).items()
        for to in targets
        if unit(name) == "cli" and unit(to) in ("budgets", "compression", "engines", "verbs")
    ]
    for path in (ROOT / "cli").rglob("*.py"):
        for statement in statements(ast.parse(path.read_text(encoding="utf-8")), types=False):
            if isinstance(statement, ast.ImportFrom) and statement.module not in ("halfplate", "halfplate.cli"):
                past += [f"{path.name}: {ast.unparse(statement)}" for alias in statement.names if alias.name in VERBS]
    assert past == []


def test_the_imports_that_count(tmp_path):
    """In functions, of modules and of names, in either branch of a condition; not those for type checkers alone."""
    package = tmp_path / "house"
    (package / "room").mkdir(parents=True)
    for file in ("__init__", "low", "room/__init__", "room/high"):
        (package / f"{file}.py").write_text("")
    (package / "room/high.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house import room\nelse:\n    import os\n"
        "def f():\n    if f:\n        from house.low import name\n"
    )
    (package / "low.py").write_text("async def g():\n    from house.room import high\n")
    imports = imports_of(package)
    assert imports == {
        "house": set(),
        "house.low": {"house.room.high"},
        "house.room": set(),
        "house.room.high": {"house.low"},
    }
    assert set(cycle(imports)) == {"house.low", "house.room.high"}
    assert cycle(grouped(imports, lambda name: name.removesuffix(".high"))) != []
