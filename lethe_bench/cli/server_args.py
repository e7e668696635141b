"""SGLang's arguments as a command passes them on: all but those that the command sets itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from lethe_sglang.config import ConfigError

REPLICAS = ("--dp-size", "--data-parallel-size")
"""SGLang's names of a number of replicas: commands read what the first one counts."""


def split(text: str, command: str, own: Mapping[str, str]) -> tuple[str, ...]:
    """Split the value of ``--server-args`` as a shell does, and check it.

    Parameters
    ----------
    text
        What follows ``--server-args``.
    command, own
        As in :func:`check`.

    Raises
    ------
    ConfigError
        If quotes do not match, or an argument is the command's own.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--server-args {text!r}: {error}; quote each argument as in a shell") from None
    check(words, command, own, "--server-args")
    return words


def check(words: Iterable[str], command: str, own: Mapping[str, str], where: str) -> None:
    """Refuse arguments that a command sets itself, several replicas, and every flag of this plugin.

    SGLang takes the beginning of an argument's name for the whole (and ``--model`` for ``--model-path``), so a
    beginning of the command's own is refused as well.

    Parameters
    ----------
    words
        Arguments of SGLang's launcher.
    command
        Its name, for the message.
    own
        Argument that it sets -> what to do instead, such as "use --port of lethe bench"; empty if nothing.
    where
        The option that held the words, for the message.

    Raises
    ------
    ConfigError
        With one line that names the argument and what to do instead.
    """
    for word in words:
        name = word.partition("=")[0]
        meant = [option for option in own if name.startswith("--") and option.startswith(name)]
        if len(name) > 3 and any(option.startswith(name) for option in REPLICAS):
            raise ConfigError(
                f"{where}: {word!r}: {command} measures one replica, and would report the first; leave it out"
            )
        if meant or name.startswith("--kv-evict"):
            instead = own[meant[0]] if meant else ""
            raise ConfigError(f"{where}: {word!r} is set by {command}; {instead or 'leave it out'}")
