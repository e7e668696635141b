"""One SGLang version at a time: its number, and the source of every function that the plugin wraps or leans on."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import pkgutil
import sys
from pathlib import Path

SUPPORTED = "0.5.23"
SOURCES = Path(__file__).with_name("upstream.json")
"""Hash of every target's source in the supported version."""


class CompatError(RuntimeError):
    """The installed SGLang is not the one this plugin was written for."""


def source_hash(target: str) -> str:
    """Hash the source of a function or class (what hooks wrap is looked through).

    Of ``module:name`` the file is read: the module itself can be imported on a GPU only.
    """
    module, _, name = target.partition(":")
    source: str | None
    if name:
        spec = importlib.util.find_spec(module)
        text = Path(spec.origin).read_text() if spec is not None and spec.origin else ""
        found = [node for node in ast.parse(text).body if getattr(node, "name", None) == name]
        source = ast.get_source_segment(text, found[0]) if found else None
    else:
        source = inspect.getsource(inspect.unwrap(pkgutil.resolve_name(target)))
    if source is None:
        raise AttributeError(target)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def changed() -> list[str]:
    """Name the targets whose source in the installed SGLang is not the recorded one, or that it no longer has."""
    return [target for target, recorded in json.loads(SOURCES.read_text()).items() if not _same(target, recorded)]


def _same(target: str, recorded: str) -> bool:
    try:
        return source_hash(target) == recorded
    except (AttributeError, ImportError, OSError, TypeError):
        return False


def version_check() -> None:
    """Check the version and the sources.

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
    differing = changed()
    if differing:
        raise CompatError(
            f"--kv-evict: the installed sglang {version} differs from the released one in {', '.join(differing)}; "
            f"pip install --force-reinstall --no-deps sglang=={SUPPORTED}, or use --kv-evict none"
        )


def write() -> None:
    """Record the sources of the installed SGLang (maintainers, when a new version is supported)."""
    from lethe_sglang.engine.hooks import TARGETS

    SOURCES.write_text(json.dumps({target: source_hash(target) for target in TARGETS}, indent=2) + "\n")


def main() -> int:
    """Say what another SGLang changed, or record a new one.

    Returns
    -------
    int
        1 if ``--against-installed`` found targets that changed, each printed on a line of its own; else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against-installed", action="store_true", help="list what the installed SGLang changed")
    what.add_argument("--write", action="store_true", help="record the installed SGLang as the supported one")
    args = parser.parse_args()
    if args.write:
        write()
    else:
        differing, version = changed(), importlib.metadata.version("sglang")
        print(f"sglang {version}: {len(differing)} of the targets recorded from {SUPPORTED} changed")
        for target in differing:
            print(target)
        return int(bool(differing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
