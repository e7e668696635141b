"""The rooms import downwards only, modules stay small, and what leans on SGLang says why."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, LABORATORY = ROOT / "lethe_sglang", ROOT / "lethe_bench"
MAY_IMPORT = {
    "errors": set(),
    "policies": {"errors"},
    "config": {"errors", "policies"},
    "allocation": {"config"},
    "kernels": {"config", "policies"},
    "cache": {"config", "policies", "allocation", "kernels"},
    "observers": {"config", "policies", "allocation", "kernels", "cache"},
    "attention": {"config", "policies", "allocation", "kernels", "cache", "observers"},
    "profiling": {"config", "allocation", "observers"},
    "engine": {"errors", "config", "policies", "allocation", "kernels", "cache", "observers", "attention", "profiling"},
    "cli": {"config", "policies", "allocation"},
}
EXCEPTIONS = {("cli/show.py", "lethe_sglang.engine.support")}
"""The support matrix is what the guard refuses; ``lethe show --support`` prints it."""
LEAVES = {"errors", "files", "processes"}
"""Modules that every room may import, and that import none."""
OF_THE_PRODUCT = {
    "cache",
    "config",
    "policies",
    "allocation",
    "kernels",
    "cli.show_profile",
    "attention.prefill",
    "profiling.run",
    *LEAVES,
}
"""What the laboratory may import: what a configuration means, and tools. Servers it knows over HTTP alone; an engine
only through ``profiling.run``, which starts one as ``lethe profile`` does."""
OF_ITS_OBSERVERS = {"observers.base", "kernels.common", "kernels.table", "cache.layout", "cache.ledger", "cache.rounds"}
"""What ``lethe_bench/observers`` may import, and only that: a server process loads them."""
SRT_ALLOWED = ("engine/", "attention/", "profiling/", "plugin.py", "cache/pool.py")
MODULES, EXPERIMENTS = sorted(PACKAGE.rglob("*.py")), sorted(LABORATORY.rglob("*.py"))


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
    room = where.split("/")[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lethe_sglang" and len(parts) > 1 and room in MAY_IMPORT and parts[1] in MAY_IMPORT:
            allowed = parts[1] == room or parts[1] in MAY_IMPORT[room]
            assert allowed or (where, ".".join(parts[:3])) in EXCEPTIONS, f"{where} imports {name}"
        if name.startswith("sglang.srt"):
            assert where.startswith(SRT_ALLOWED), f"{where} imports {name}"
        assert parts[0] != "lethe_bench", f"{where} imports {name}: the product does not know the laboratory"
        assert parts[0] != "lethe_sglang" or where.removesuffix(".py") not in LEAVES, f"{where} is a leaf"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(LABORATORY)))
def test_the_laboratory_takes_little_of_the_product_and_nothing_of_the_engine(path):
    of_observers = path.parent.name == "observers"
    for name in imports(path):
        parts = name.split(".")
        assert not of_observers or parts[0] != "lethe_bench", f"{path} imports {name}: a server process loads it"
        assert parts[0] != "sglang", f"{path} imports {name}: servers are other processes"
        if of_observers and parts[0] == "lethe_sglang":
            assert ".".join(parts[1:3]) in OF_ITS_OBSERVERS, f"{path} imports {name}"
        elif parts[0] == "lethe_sglang" and len(parts) > 1:
            part = parts[1] if parts[1] not in ("cli", "attention", "profiling") else ".".join(parts[1:3])
            assert part in OF_THE_PRODUCT, f"{path} imports {name}"


def test_every_room_of_the_product_has_its_rule():
    rooms = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in MODULES}
    assert rooms == {*MAY_IMPORT, *LEAVES, "__init__", "plugin"}


def test_modules_stay_small():
    lines = {p: len(p.read_text().splitlines()) for p in (*MODULES, *EXPERIMENTS)}
    assert not {str(p): n for p, n in lines.items() if n > 400}


def test_every_target_has_its_source_and_reason():
    from lethe_sglang.engine import compat, hooks

    assert set(json.loads(compat.SOURCES.read_text())) == set(hooks.TARGETS)
    assert len(set(hooks.TARGETS)) == len(hooks.TARGETS)
    assert not [r.target for r in (*hooks.HOOKS, *hooks.RELIANCES) if len(r.why) < 20 or not r.why.endswith(".")]


def test_the_formatter_is_never_switched_off():
    folders = ("lethe_sglang", "lethe_bench", "lethe_cpu", "tests", "scripts", "models")
    marks = [f"# fmt: {word}" for word in ("skip", "off")]
    files = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    assert not [str(p) for p in files if any(mark in p.read_text() for mark in marks)]


def test_a_module_that_needs_a_gpu_is_read_and_not_imported(tmp_path, monkeypatch):
    from lethe_sglang.engine import compat

    file = tmp_path / "gpu_only.py"
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for body in ("x = 1", "x = 2"):
        file.write_text(f"import no_such_driver\n\n\nclass Backend:\n    {body}\n\n\nelsewhere = {len(hashes)}\n")
        hashes.append(compat.source_hash("gpu_only:Backend"))
        file.write_text(file.read_text().replace("elsewhere = ", "elsewhere = 7"))
        assert compat.source_hash("gpu_only:Backend") == hashes[-1]
    assert len(set(hashes)) == 2
    for gone in ("gpu_only:Other", "no_such_module:Backend"):
        with pytest.raises(AttributeError):
            compat.source_hash(gone)
