"""The ``lethe`` program: which commands it has, what one of them can do to the others, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from importlib.metadata import EntryPoint, distribution, entry_points
from pathlib import Path
from types import ModuleType

import pytest
from closed_pipe import closed
from profiles import profile

from lethe_sglang.allocation.profile import save
from lethe_sglang.cli import main as cli

ROOT = Path(__file__).parents[2]
OURS = {"show", "profile", "plan", "bench", "load", "burst", "eval", "model", "gpu", "profiles", "sensitivity", "top"}


def foreign(folder: Path, **commands: str) -> dict[str, str]:
    """Install a distribution with commands of its own (name -> source of the module); returns the environment."""
    info = folder / "foreign-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1\n")
    lines = ["[lethe.commands]", *(f"{name} = foreign_{name}" for name in commands)]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, source in commands.items():
        (folder / f"foreign_{name}.py").write_text(textwrap.dedent(source))
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def lethe(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lethe_sglang.cli.main", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)


TALKATIVE = '''
    """``lethe talk``: say a lot."""
    def add_parser(subparsers):
        subparsers.add_parser("talk").add_argument("--size", type=int, default=1)
    def run(args):
        for _ in range(args.size):
            print("x" * 1000)
        return 3
'''


# -- commands ----------------------------------------------------------------------------------------------------------


def test_the_commands_of_this_distribution_are_these():
    assert {command.name for command in distribution("lethe-sglang").entry_points.select(group=cli.GROUP)} == OURS
    assert set(cli.commands()) >= OURS


def test_help_lists_every_command_with_its_summary_and_imports_none():
    code = "import sys; from lethe_sglang.cli.main import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    printed, _, modules = done.stdout.strip().rpartition("\n")
    assert done.returncode == 0
    for command in entry_points(group=cli.GROUP):
        found = re.search(rf"^ {{4}}{command.name}(?: +|\n {{5,}})(\S.*)$", printed, re.MULTILINE)
        assert found and len(found[1].split()) > 3, "no summary"
        assert command.module not in modules.split()


@pytest.fixture
def known(monkeypatch):
    """Commands in place of those that are installed: name -> module."""

    def put(**modules):
        points = [EntryPoint(name, module, cli.GROUP) for name, module in modules.items()]
        monkeypatch.setattr(cli, "entry_points", lambda group: points)

    return put


def test_a_command_imports_its_own_module_only(monkeypatch, known):
    ran = []
    module = ModuleType("fake")
    module.add_parser = lambda subparsers: subparsers.add_parser("fake").add_argument("--size", type=int)
    module.run = lambda args: ran.append(args.size) or 3
    monkeypatch.setitem(sys.modules, "fake", module)
    known(fake="fake", broken="no_such_module")
    assert cli.main(["fake", "--size", "7"]) == 3
    assert ran == [7]


def test_a_broken_command_of_somebody_else_breaks_no_other(tmp_path):
    broken = {"torn": "def (", "gone": "import no_such_module", "rude": "raise SystemError('no\\nway')"}
    environment = foreign(tmp_path, talk=TALKATIVE, **broken)
    assert lethe("show", **environment).returncode == 0
    listed = lethe("--help", **environment)
    assert listed.returncode == 0 and "say a lot" in listed.stdout
    assert all(f"\n    {name}" in listed.stdout for name in (*broken, *OURS))
    assert lethe("talk", **environment).returncode == 3
    for name, message in (
        ("torn", "foreign_torn cannot be loaded: SyntaxError: "),
        ("gone", "needs the module no_such_module, which is not installed"),
        ("rude", "foreign_rude cannot be loaded: SystemError: no"),
    ):
        done = lethe(name, **environment)
        assert done.returncode == 2 and done.stderr.startswith(f"lethe {name}: error: {message}"), done.stderr
        assert done.stderr.count("\n") == 1 and "lethe-sglang[bench]" not in done.stderr


def test_nobody_takes_over_a_command_of_ours(tmp_path):
    done = lethe("show", "--presets", **foreign(tmp_path, show=TALKATIVE))
    assert done.returncode == 0 and "cpu-demo" in done.stdout


def test_a_missing_extra_is_one_line_that_says_what_to_install(monkeypatch, tmp_path, capsys):
    save(profile(), tmp_path / "p.yaml")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["profiles", str(tmp_path / "p.yaml"), "--plot", str(tmp_path / "p.png")]) == 2
    error = capsys.readouterr().err
    assert error == (
        "lethe profiles: error: needs the module matplotlib, which is not installed; "
        "pip install 'lethe-sglang[bench]'\n"
    )


def test_a_full_disk_is_one_line_whatever_the_command(monkeypatch, capsys):
    def run(args):
        raise OSError(28, "No space left on device", "results/run.jsonl")

    command = ModuleType("full")
    command.add_parser, command.run = lambda subparsers: subparsers.add_parser("plan"), run
    monkeypatch.setattr(cli, "_loaded", lambda entry: command)
    assert cli.main(["plan"]) == 2
    line = "lethe plan: error: results/run.jsonl: No space left on device; free some room, or write elsewhere\n"
    assert capsys.readouterr().err == line
    command.run = lambda args: (_ for _ in ()).throw(OSError(13, "Permission denied"))
    with pytest.raises(PermissionError):  # a fault of ours, or one that the command has words for
        cli.main(["plan"])


# -- ends --------------------------------------------------------------------------------------------------------------

PRINTING = [
    ["--help"],
    *([name, "--help"] for name in sorted(OURS)),
    ["show"],
    ["show", "--presets"],
    ["show", "--support"],
    ["gpu", "all", "--dry-run"],
]


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_command_whose_reader_has_gone_ends_without_a_word(arguments):
    assert closed(*arguments) == (141, "")


def test_without_a_buffer_help_ends_without_a_word():
    assert closed("show", "--help", PYTHONUNBUFFERED="1") == (0, ""), "argparse takes the broken pipe for itself"


def test_a_plan_and_a_profile_whose_reader_has_gone_end_without_a_word(tmp_path):
    save(profile(), tmp_path / "p.yaml")
    assert closed("show", "profile", str(tmp_path / "p.yaml")) == (141, "")
    model = str(ROOT / "models" / "reasoner")
    assert closed("plan", "--model-path", model, "--context", "16000", "--gpu-mem", "80") == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("size", ["0", "1", "1000"])
def test_a_command_of_somebody_else_ends_so_too(tmp_path, size, unbuffered):
    environment = {**foreign(tmp_path, talk=TALKATIVE), "PYTHONUNBUFFERED": unbuffered}
    assert closed("talk", "--size", size, **environment) == (141 if size != "0" else 3, "")


@pytest.mark.parametrize("arguments", [["--help"], ["show"], ["nope"], ["show", "--kv-evict-config", "nope"]])
def test_errors_whose_reader_has_gone_end_so_too(arguments):
    assert closed(*arguments, both=True)[0] == 141


def test_another_broken_pipe_is_not_hidden(monkeypatch, known):
    def fail(args):
        raise BrokenPipeError("of a server")

    module = ModuleType("fake")
    module.add_parser, module.run = lambda subparsers: subparsers.add_parser("fake"), fail
    monkeypatch.setitem(sys.modules, "fake", module)
    known(fake="fake")
    with pytest.raises(BrokenPipeError, match="of a server"):
        cli.main(["fake"])


def test_ctrl_c_is_one_line(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    wait = '''
        """``lethe wait``: wait."""
        import time
        def add_parser(subparsers): subparsers.add_parser("wait")
        def run(args):
            print("waiting", flush=True)
            time.sleep(60)
    '''
    command = [sys.executable, "-m", "lethe_sglang.cli.main", "wait"]
    env = {**os.environ, **foreign(tmp_path, wait=wait)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "lethe: interrupted\n")
