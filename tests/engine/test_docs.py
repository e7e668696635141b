"""Both wheels in a fresh environment, the README's server from them, and what the pages and the examples ask it.

The environment sees the packages of the test environment, so that nothing is downloaded, but neither our own packages
there nor the checkout: what runs here is what the wheels carry. The offline example alone runs on the checkout.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import QUIET, ROOT, WARM, Server
from doc_blocks import blocks, commands

from lethe_bench import servers

NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "out", "dist", "results", "__pycache__", ".*_cache", ".hypothesis")
PORT = "30000"  # SGLang's default, which the pages use


class Fresh:
    """An environment of its own and a copy of the checkout to build in."""

    def __init__(self, folder: Path):
        self.checkout = folder / "checkout"
        shutil.copytree(ROOT, self.checkout, ignore=NOT_COPIED)
        self.venv = folder / "venv"
        venv.create(self.venv, symlinks=True)
        program = self.venv / "bin" / "pip"  # pip itself is one of the packages that the environment sees
        program.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -m pip "$@"\n')
        program.chmod(0o755)
        self.site = next(self.venv.glob("lib/python*/site-packages"))
        others = folder / "others"
        others.mkdir()
        sites = [path for path in map(Path, sys.path) if path.name == "site-packages"]
        for entry in (entry for site in sites for entry in site.iterdir()):
            link = others / entry.name
            ours = "lethe" in entry.name or entry.suffix == ".pth" or entry.name == "__pycache__"
            if not ours and not link.exists():
                link.symlink_to(entry)
        (self.site / "others.pth").write_text(f"{others}\n")
        self.env = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
            **QUIET,  # without the strict checks: what is printed serves without them, and they go through a large pool
            "PATH": f"{self.venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONSAFEPATH": "1",  # or `python -m` would put the checkout, the working directory, on its path
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",  # they are there; pip would take minutes to see it (a test looks at what is asked for)
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it the wrong way round: no isolation, so hatchling is found
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def run(self, command: str, timeout: float = 300) -> str:
        """Run a shell command in the copy; it must succeed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.checkout,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout


class InstalledServer(Server):
    """A server of the fresh environment, started by a command of the README."""

    start = servers.Server.start  # as the command says, with nothing imported before

    def __init__(self, command: str, fresh: Fresh, log: Path):
        port = servers.some_free_port()
        line = f"cd {shlex.quote(str(fresh.checkout))} && exec {command} --port {port} --sleep-on-idle"
        servers.Server.__init__(self, ["bash", "-c", line], port, log)
        self.environment = {name: self.environment[name] for name in ("NO_PROXY", "no_proxy")} | fresh.env
        self.start()


@pytest.fixture(scope="module")
def readme():
    """The commands of the README's CPU block: some that install, one that serves."""
    (block,) = blocks("serve")
    *install, serve = commands(block)
    assert "sglang.launch_server" in serve and "pip install" in install[-1]
    return install, serve


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, readme):
    fresh = Fresh(tmp_path_factory.mktemp("fresh"))
    for command in readme[0]:
        fresh.run(command)
    return fresh


@pytest.fixture(scope="module")
def server(fresh, readme, log_dir):
    server = InstalledServer(readme[1], fresh, log_dir / "test_docs.log")
    try:
        yield server.wait()
        server.check_healthy()
    finally:
        server.stop()


def test_the_wheels_hold_what_they_should(fresh):
    ours, cpu = sorted(fresh.checkout.glob("dist/*.whl"), reverse=True)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    names = set(zipfile.ZipFile(ours).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(packages)
    presets = {f"lethe_sglang/presets/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert presets | sources <= names and "lethe_sglang/py.typed" in sources
    assert "lethe_cpu/py.typed" in zipfile.ZipFile(cpu).namelist()


def test_the_wheels_ask_for_what_is_there(fresh):
    program = """
        from importlib.metadata import requires, version
        from packaging.requirements import Requirement
        for distribution in ("lethe-sglang", "lethe-cpu"):
            for asked in map(Requirement, requires(distribution)):
                if asked.marker is None or asked.marker.evaluate({"extra": ""}):
                    assert asked.specifier.contains(version(asked.name)), asked
                    print(asked)
    """
    asked = fresh.run(f"python -c {shlex.quote(textwrap.dedent(program))}").splitlines()
    assert asked.count("sglang==0.5.23") == 2 and len(asked) >= 5


def test_the_source_distribution_builds_the_same_wheel(fresh):
    fresh.run("python -m hatchling build -t sdist -d sdist && pip wheel -q --no-deps --wheel-dir again sdist/*.tar.gz")
    (sdist,) = fresh.checkout.glob("sdist/*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if "/tests/" in name or "/models/" in name]
    wheels = [next(fresh.checkout.glob(f"{folder}/lethe_sglang-*.whl")) for folder in ("dist", "again")]
    first, second = ({info.filename: info.CRC for info in zipfile.ZipFile(wheel).infolist()} for wheel in wheels)
    assert first == second


def test_the_installed_programs_run_from_the_wheel(fresh):
    where = fresh.run("python -c 'import lethe_sglang, lethe_cpu; print(lethe_sglang.__file__, lethe_cpu.__file__)'")
    assert all(str(fresh.site) in path for path in where.split())
    assert fresh.run("lethe show").startswith("# R = 308 ")
    listed = [line.split()[0] for line in fresh.run("lethe show --presets").splitlines()]
    assert listed == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_the_server_of_the_readme_evicts(server):
    assert server.lethe()["policy"] == "lethe"


@pytest.mark.parametrize("block", blocks("server"), ids=lambda block: block.name)
def test_a_block_that_asks_the_server_succeeds(fresh, server, block):
    assert PORT in block.text
    assert len(fresh.run(block.text.replace(PORT, str(server.port)))) > 20


def test_the_guide_explains_every_counter(server):
    page = (ROOT / "docs" / "guide.md").read_text()
    assert not [name for name in server.lethe() if f"`{name}`" not in page]


def test_example_chat(fresh, server):
    reply, counters = fresh.run(f"python examples/chat.py {server.url}").splitlines()
    assert reply.startswith("60t>o,59o>t,") and reply.endswith(",.t")
    assert "since its start: 0 rounds" not in counters


def test_example_per_request(fresh, server):
    lines = fresh.run(f"python examples/per_request.py {server.url}").splitlines()
    assert [line.split(":")[0].strip() for line in lines[:3]] == ["None", "{'budget'", "none"]
    assert all(line.endswith(",.t") for line in lines[:3])
    assert "refused: 400" in lines[3] and "custom_params.kv_evict.budget" in lines[3]


def test_example_offline_engine():
    done = WARM.run([ROOT / "examples" / "offline_engine.py"])
    assert done.returncode == 0, done.stderr
    reply, held, changed = done.stdout.splitlines()[-3:]
    assert reply.startswith("60t>o,59o>t,")
    rounds, most, stock = (int(word) for word in held.replace(";", " ").split() if word.isdigit())
    assert rounds > 3 and most < 0.6 * stock
    assert changed == "{'budget.tokens': [64, 96]}"
