"""The documentation says what the code does: commands are run or marked, pages are current, links lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from importlib.metadata import entry_points
from pathlib import Path

import doc_blocks
import pytest
import yaml
from doc_blocks import ROOT, Block, blocks, commands

from lethe_sglang.cli import main as cli
from lethe_sglang.config import EvictionConfig, resolve
from lethe_sglang.config.errors import known_keys
from lethe_sglang.policies.registry import IN_TREE, policy_class

FLAGS = {"--kv-evict": 0, "--kv-evict-config": 1, "--kv-evict-budget": 2, "--kv-evict-profile": 3}


def script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(block: Block) -> str:
    return block.name


# -- commands ---------------------------------------------------------------------------------------------------------


def test_every_block_says_what_proves_it():
    assert len(blocks()) > 10
    unmarked = [b.name for b in blocks() if b.kind is None]
    assert not unmarked, f"put one of the markers of tests/doc_blocks.py above: {unmarked}"


def test_a_block_without_a_marker_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- run -->\n```bash\nlethe show\n```\n\n- a list\n\n    ```python\n    x = 1\n    ```\n\n```\nart\n```\n"
    )
    monkeypatch.setattr(doc_blocks, "pages", lambda: [page])
    monkeypatch.setattr(doc_blocks, "ROOT", tmp_path)
    found = doc_blocks.blocks()
    assert [(b.marker, b.language, b.line, b.text) for b in found] == [
        ("run", "bash", 2, "lethe show\n"),
        (None, "python", 8, "x = 1\n"),
    ]


@pytest.mark.parametrize("block", blocks("run"), ids=named)
def test_a_block_marked_run_succeeds(block):
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*program, block.text], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", blocks("gpu", "model", "serve"), ids=named)
def test_options_of_a_block_that_is_not_run_exist(block):
    known = 0
    for command in commands(block):
        words = shlex.split(command)
        if words[0] == "lethe":
            command_of(words[1:])
            known += 1
        elif "sglang.launch_server" in words:
            asked = [None] * len(FLAGS)
            for flag, value in itertools.pairwise(words):
                if flag.startswith("--kv-evict"):
                    asked[FLAGS[flag]] = int(value) if flag == "--kv-evict-budget" else value
            assert asked[0] is not None
            resolve(*asked)
            known += 1
    assert known, f"{block.name}: no command whose options a test knows"


def command_of(words: list[str]) -> None:
    """Parse a command line of ``lethe`` without running it."""
    parser = argparse.ArgumentParser(prog="lethe", exit_on_error=False, allow_abbrev=False)
    (command,) = entry_points(group=cli.GROUP, name=words[0])
    command.load().add_parser(parser.add_subparsers())
    parser.parse_args(words)


@pytest.mark.parametrize("block", blocks("part of"), ids=named)
def test_a_part_of_a_file_stands_in_it(block):
    lines = map(str.strip, block.file.read_text().splitlines())
    for wanted in filter(None, map(str.strip, block.text.splitlines())):
        assert wanted in lines, f"{block.marker} does not have, in this order: {wanted}"


@pytest.mark.parametrize("block", blocks("tested by"), ids=named)
def test_what_tests_a_block_runs_the_same_command(block):
    text = block.file.read_text()
    words = {word for command in commands(block) for word in re.findall(r"[\w-]{4,}", command)} - {"python", "bash"}
    assert words and not [word for word in words if word not in text]


# -- pages ------------------------------------------------------------------------------------------------------------


def test_generated_pages_and_pictures_are_current():
    assert not script("docs").stale(), "run: python scripts/docs.py"


def test_a_stale_page_is_found(tmp_path, monkeypatch):
    docs = script("docs")
    (tmp_path / "support.md").write_text("old")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "GENERATED", {tmp_path / "support.md": docs.support, tmp_path / "gone.md": docs.support})
    assert docs.stale() == ["support.md", "gone.md"]
    monkeypatch.setattr(docs.sys, "argv", ["docs.py", "--check"])
    assert docs.main() == 1
    monkeypatch.setattr(docs.sys, "argv", ["docs.py"])
    assert docs.main() == 0 and docs.stale() == []


def test_the_support_page_is_what_the_program_prints(capsys):
    assert cli.main(["show", "--support"]) == 0
    rows = [line.split(" | ") for line in (ROOT / "docs" / "support.md").read_text().splitlines() if line[:1] == "|"]
    assert capsys.readouterr().out.splitlines() == [" | ".join(row[:3]) + " |" for row in rows]


def test_what_is_called_supported_is_proven_by_a_test():
    docs = script("docs")
    claims = docs.proofs()
    assert not docs.unproven(claims)
    for name in {name for names in claims.values() for name in names}:
        assert f"`{name}`" in (ROOT / "docs" / "support.md").read_text()


def test_a_row_without_a_test_and_a_test_without_a_row_are_found(tmp_path, monkeypatch):
    docs = script("docs")
    claims = docs.proofs()
    del claims["LoRA"]
    claims["teleportation"] = ["unit/test_x.py::test_y"]
    wrong = ["LoRA: yes, but no test proves it", "unit/test_x.py::test_y proves 'teleportation', which is no row"]
    assert docs.unproven(claims) == wrong
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "import pytest\npytestmark = pytest.mark.proves('a', 'b')\n@pytest.mark.gpu\n@pytest.mark.proves('a')\n"
        "def test_c(): pass\n"
    )
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert docs.proofs() == {"a": ["test_a.py", "test_a.py::test_c"], "b": ["test_a.py"]}


def test_the_configuration_page_is_what_the_program_prints(capsys):
    assert cli.main(["show", "--options"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "configuration.md").read_text()


def test_the_configuration_page_names_every_option():
    page = (ROOT / "docs" / "configuration.md").read_text()
    known = known_keys(EvictionConfig, **{name: policy_class(name) for name in IN_TREE})
    sections = set(known) - {""}
    options = [f"{section}.{key}".strip(".") for section, keys in known.items() for key in keys if key not in sections]
    assert len(options) > 25 and sorted(options) == sorted(re.findall(r"^\| `([\w.]+)`", page, re.MULTILINE))


def test_the_readmes_table_is_that_of_the_study():
    arms = json.loads((ROOT / "docs" / "results" / "fidelity" / "quarter.json").read_text())["arms"]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in (ROOT / "README.md").read_text().splitlines()]
    head = rows.index(next(row for row in rows if row[2:] == ["KL", "values"]))
    found = {row[0].strip("`") or "lethe-fidelity": row[2:] for row in itertools.takewhile(bool, rows[head + 2 :])}
    assert set(found) == {*IN_TREE, "lethe-fidelity"}
    for name, cells in found.items():
        means = arms.get(name)
        assert cells == ([f"{means['kl']['mean']:.3f}", f"{means['recall']['mean']:.2f}"] if means else ["-", "-"])


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.partition("## Links")[0]) <= 5_400


def test_every_room_is_explained():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "lethe_sglang").glob("*/__init__.py")]
    assert not [room for room in rooms if f"`{room}/`" not in page]


LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in doc_blocks.pages()])
def test_links_between_files_lead_somewhere(page):
    """Anchors inside docs/ are checked by mkdocs, below; pages outside of it are checked here only."""
    for target in LINK.findall((ROOT / page).read_text()):
        if target.startswith(("http://", "https://", "#")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file
        assert path.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{page}: {target}"


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "guide.html").is_file()


# -- what surrounds the code ------------------------------------------------------------------------------------------


def project(folder: str = ".") -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]


def test_tools_have_one_version_everywhere():
    extras = [line for group in project()["optional-dependencies"].values() for line in group]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]
    assert f"ruff=={hooks['rev'].removeprefix('v')}" in extras
    workflow = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    for pinned in re.findall(r"\S+==\S+", workflow):
        assert pinned in extras, f"checks.yml installs {pinned}"


def test_both_distributions_and_the_citation_have_one_version():
    import lethe_sglang

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    versions = {project()["version"], project("lethe_cpu")["version"], citation["version"], lethe_sglang.__version__}
    assert len(versions) == 1


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_templates_are_readable(path):
    content = yaml.safe_load(path.read_text())
    assert content["name"]
    for job in content.get("jobs", {}).values():
        for step in job["steps"]:
            for name in re.findall(r"scripts/[\w.]+", step.get("run", "")):
                assert (ROOT / name).is_file(), name
