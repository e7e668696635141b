"""The rooms import downwards only, and the documents say what the code does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lethe_sglang.config import EvictionConfig

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lethe_sglang"
MAY_IMPORT = {
    "config": set(),
    "policies": {"config"},
    "allocation": {"config"},
    "kernels": {"config", "policies"},
    "cache": {"config", "policies", "allocation", "kernels"},
    "attention": {"config", "policies", "allocation", "kernels", "cache"},
    "profiling": {"config", "allocation", "attention"},
    "engine": {"config", "policies", "allocation", "kernels", "cache", "attention", "profiling"},
    "evaluation": {"config", "policies", "allocation", "engine"},
    "cli": {"config", "policies", "allocation", "profiling", "evaluation"},
}
EXCEPTIONS = {("cli/show.py", "lethe_sglang.engine.guard")}
"""The support matrix is what the guard refuses; ``lethe show --support`` prints it."""
SRT_ALLOWED = ("engine/", "attention/", "profiling/", "plugin.py", "cache/pool.py")
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards_and_sglang_stays_in_its_rooms(path):
    where = path.relative_to(PACKAGE).as_posix()
    room = where.split("/")[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lethe_sglang" and len(parts) > 1 and room in MAY_IMPORT and parts[1] in MAY_IMPORT:
            allowed = parts[1] == room or parts[1] in MAY_IMPORT[room]
            assert allowed or (where, ".".join(parts[:3])) in EXCEPTIONS, f"{where} imports {name}"
        if name.startswith("sglang.srt"):
            assert where.startswith(SRT_ALLOWED), f"{where} imports {name}"


def test_modules_stay_small():
    assert not {str(p): n for p in MODULES if (n := len(p.read_text().splitlines())) > 450}


def options(model, prefix=""):
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from options(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_readme_names_every_option():
    readme = (ROOT / "README.md").read_text()
    assert not [option for option in options(EvictionConfig) if f"`{option}`" not in readme]


def test_the_readme_shows_the_support_matrix_of_the_guard():
    from lethe_sglang.engine.guard import support_matrix

    assert support_matrix() in (ROOT / "README.md").read_text(), "paste the output of: lethe show --support"


def test_the_formatter_is_never_switched_off():
    marks = [f"# fmt: {word}" for word in ("skip", "off")]
    files = [p for folder in ("lethe_sglang", "lethe_cpu", "tests", "scripts") for p in (ROOT / folder).rglob("*.py")]
    assert not [str(p) for p in files if any(mark in p.read_text() for mark in marks)]
