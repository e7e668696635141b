"""Profiles that servers made for themselves, one file per model, in the user's cache directory.

Two servers that start at once make one profile: whoever holds the lock measures, the other waits and reads. A profile
that cannot be read is made again. Where the directory cannot be written to, or its disk is full, the profile is made,
used, and not kept.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from lethe_sglang.allocation.fingerprint import ModelFingerprint
from lethe_sglang.allocation.profile import FORMAT, Profile, load
from lethe_sglang.config import ConfigError
from lethe_sglang.files import cache_folder
from lethe_sglang.profiling.records import Partial

logger = logging.getLogger("lethe_sglang")

PROBE_BYTES = 2**20
"""What has to fit before a profile is made: more than the profile and the records of its prompts take."""


def directory() -> Path:
    """Return the folder of the profiles, in the user's cache directory (:func:`~lethe_sglang.files.cache_folder`)."""
    return cache_folder("profiles")


def file_of(model: ModelFingerprint, folder: Path) -> Path:
    """Return where a model's profile lies."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-.") or "model"
    return folder / f"{name[:60]}-{model.key}-{FORMAT}.yaml"


def obtain(model: ModelFingerprint, make: Callable[[Path], None], folder: Path | None = None) -> Profile:
    """Return the model's profile from the cache, making it if need be.

    Parameters
    ----------
    model
        The server's model.
    make
        Measures and writes the profile to a path.
    folder
        The cache; None is :func:`directory`.

    Raises
    ------
    ConfigError
        If ``make`` raises it, or what it wrote is no profile of this model.
    """
    try:
        path = file_of(model, directory() if folder is None else folder)
        if (found := _read(path, model)) is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("a")
    except OSError as error:
        return _not_kept(model, make, error)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("KV eviction: another server is measuring this model; waiting for its profile")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            return _not_kept(model, make, error)
        if (found := _read(path, model)) is None:
            no_room = OSError(errno.ENOSPC, f"{path.parent} cannot be written to, or its disk is full")
            if not _writable(path.parent):
                return _not_kept(model, make, no_room)
            try:
                make(path)
            except ConfigError:
                if _writable(path.parent):
                    raise
                Partial(path, key="").remove()  # it has taken the last room, and can never be finished
                return _not_kept(model, make, no_room)
            found = _made(path, model)
            logger.info("KV eviction: the model's profile is kept in %s", path)
        return found


def _read(path: Path, model: ModelFingerprint) -> Profile | None:
    """Read a kept profile; None, with a warning, if it is of no use."""
    if not path.exists():
        return None
    try:
        return _made(path, model)
    except ConfigError as error:
        logger.warning("KV eviction: the kept profile is of no use and is made again: %s", error)
        return None


def _made(path: Path, model: ModelFingerprint) -> Profile:
    profile = load(path)
    profile.check(model, str(path))
    return profile


def _not_kept(model: ModelFingerprint, make: Callable[[Path], None], error: OSError) -> Profile:
    memory = Path("/dev/shm")  # the disk of temporary files is often the one that is full
    try:
        scratch = tempfile.TemporaryDirectory(prefix="lethe-profile-", dir=memory if _writable(memory) else None)
    except OSError as full:
        raise ConfigError(
            f"budget.profile auto: no room for a profile, neither in the cache nor for temporary files "
            f"({full.strerror}); free some, or set --kv-evict-profile none"
        ) from None
    with scratch as folder:
        path = file_of(model, Path(folder))
        make(path)
        profile = _made(path, model)
    logger.warning(
        "KV eviction: the model's profile is used but could not be kept (%s), so the next start measures again; give a "
        "file of `lethe profile` to --kv-evict-profile",
        error.strerror or error,
    )
    return profile


def _writable(folder: Path) -> bool:
    """Try: permission bits say little about root, network and read-only file systems; a full disk takes no bytes."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError:
        return False
    return True
