"""The ``lethe`` program, whose commands are found by the entry-point group ``lethe.commands``, ours and anybody's.

A command is a module. The first line of its docstring, behind "``lethe NAME``: ", stands in ``lethe --help``;
``add_parser(subparsers)`` registers its parser under its name, and ``run(args)`` does the work and returns the exit
status. Only the module of the command that is asked for is imported, so a slow or broken one harms no other.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import importlib.util
import os
import select
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from lethe_sglang.config import ConfigError

GROUP = "lethe.commands"
EXTRA = "pip install 'lethe-sglang[bench]'"
"""What installs all that any command of ours needs."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Where a file of any command cannot be written through no fault of the program."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lethe`` and return its exit status.

    Parameters
    ----------
    argv
        The arguments after the program's name; None takes those of the process.

    Returns
    -------
    int
        0 if the command succeeded, 2 if its configuration, installation or disk is at fault, 130 after Ctrl-C, 141 if
        what reads the output has gone (as for any program that a closed pipe ends), else what the command returned.
    """
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:  # while a closed pipe can still be caught: Python's own last flush would report it
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except KeyboardInterrupt as stopped:  # a command's own kind may say how to go on
        print("; ".join(filter(None, ("lethe: interrupted", str(stopped)))), file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _readers_gone():
            raise  # it was another pipe: a fault like any other
        return 128 + signal.SIGPIPE


def commands() -> dict[str, EntryPoint]:
    """Return the installed commands by name; a name of ours stays ours, whoever else takes it."""
    found: dict[str, EntryPoint] = {}
    for command in sorted(entry_points(group=GROUP), key=_ours, reverse=True):
        found.setdefault(command.name, command)
    return found


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lethe", description="Bounded KV memory for reasoning models on SGLang.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    known = commands()
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in known.items():
        if name != asked:
            subparsers.add_parser(name, help=_summary(command) if asked is None else None)
    if asked is None or asked not in known:
        parser.parse_args(arguments)  # prints the help, or says what is missing or unknown, and ends the program
        raise AssertionError(arguments)
    command = known[asked]
    try:
        module = _loaded(command)
        module.add_parser(subparsers)
        return int(module.run(parser.parse_args(arguments)))
    except ConfigError as error:
        reason = str(error)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        reason = f"{error.filename or 'its files'}: {error.strerror}; free some room, or write elsewhere"
    except ModuleNotFoundError as error:
        reason = f"needs the module {error.name}, which is not installed" + (f"; {EXTRA}" if _ours(command) else "")
    print(f"lethe {asked}: error: {reason}", file=sys.stderr)
    return 2


def _loaded(command: EntryPoint) -> Any:
    try:
        return command.load()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # it may be somebody else's
        message = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{command.value} cannot be loaded: {type(error).__name__}: {message}") from None


def _ours(command: EntryPoint) -> bool:
    return command.dist is not None and command.dist.name == "lethe-sglang"


def _summary(command: EntryPoint) -> str:
    """Return what a command is for, from its source: it is not imported. Empty if that cannot be read."""
    try:
        spec = importlib.util.find_spec(command.module)
        assert spec is not None and spec.origin is not None
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    except Exception:  # somebody else's command may be broken in any way; the list of commands still comes
        return ""
    return docstring.partition("\n")[0].removeprefix(f"``lethe {command.name}``: ").replace("``", "").rstrip(".")


def _readers_gone() -> bool:
    """Tell whether what reads the output has gone; if so, let the rest of it go nowhere."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream that is closed, or is no file
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                gone = True
    return gone


if __name__ == "__main__":
    sys.exit(main())
