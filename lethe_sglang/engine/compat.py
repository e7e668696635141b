"""One SGLang version at a time: the version, and a fingerprint of every function the plugin hooks or leans on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import pkgutil
from pathlib import Path

SUPPORTED = "0.5.23"
FINGERPRINTS = Path(__file__).with_name("fingerprints.json")


class CompatError(RuntimeError):
    """The installed SGLang is not the one this plugin was written for."""


def fingerprint(target: str) -> str:
    """Hash the source of a function or class (what hooks wrap is looked through)."""
    source = inspect.getsource(inspect.unwrap(pkgutil.resolve_name(target)))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def verify() -> None:
    """Check version and fingerprints.

    Raises
    ------
    CompatError
        One line that says what differs and what to install.
    """
    version = importlib.metadata.version("sglang")
    if version != SUPPORTED:
        raise CompatError(
            f"--kv-evict: lethe-sglang supports sglang=={SUPPORTED} and found {version}; "
            f"pip install sglang=={SUPPORTED}, or use --kv-evict none"
        )
    from lethe_sglang.engine.hooks import ALL_TARGETS

    expected = json.loads(FINGERPRINTS.read_text())
    differing = []
    for target in ALL_TARGETS:
        try:
            same = fingerprint(target) == expected.get(target)
        except (AttributeError, ImportError, OSError, TypeError):
            same = False
        if not same:
            differing.append(target)
    if differing:
        raise CompatError(
            f"--kv-evict: the installed sglang {version} differs from the released one in {', '.join(differing)}; "
            f"pip install --force-reinstall --no-deps sglang=={SUPPORTED}, or use --kv-evict none"
        )


def write() -> None:
    """Record the fingerprints of the installed SGLang (maintainers, when a new version is supported)."""
    from lethe_sglang.engine.hooks import ALL_TARGETS

    FINGERPRINTS.write_text(json.dumps({target: fingerprint(target) for target in ALL_TARGETS}, indent=2) + "\n")


if __name__ == "__main__":
    write()
