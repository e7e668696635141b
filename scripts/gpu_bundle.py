#!/usr/bin/env python3
"""Pack what a GPU machine without network access needs, in parts of at most 60 MB; check and unpack it there.

bash scripts/gpu_bundle.sh [--with-sglang [--keep-flash-ops]] [--dry-run] [--out DIR]
bash scripts/gpu_bundle.sh unpack DIR --to DIR

The target is CPython 3.12 on x86-64 Linux with CUDA 13. Distributions come at the versions of the environment that runs
this, each by name, with whatever they require that the target needs too.

Without --with-sglang the target's own PyTorch and Triton serve the kernel tests and micro-benchmarks, and only
FlashInfer and small wheels travel. With it everything that SGLang requires travels, PyTorch included, for the parts
that start servers. Of sglang-kernel the largest library, flash_ops, stays behind unless --keep-flash-ops: it is over 1 GB
unpacked and holds FlashAttention 3, which stock SGLang takes by default on Hopper.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PART_BYTES = 60_000_000
MANIFEST = "manifest.json"
KERNEL_ROOTS = ("flashinfer-python", "apache-tvm-ffi", "pydantic", "PyYAML", "hypothesis", "pytest", "pytest-timeout")
NOT_NEEDED = (
    "torch", "triton", "numpy", "nvidia-cutlass-dsl", "nvidia-cudnn-frontend", "cuda-tile", "cuda-python",
    "nccl-extensions", "nccl4py",
)  # fmt: skip
"""Left out with all they require when SGLang does not travel: the target has the first three, and FlashInfer's decode
does not import the others."""

TRIMMED = re.compile(r"^sgl_kernel/flash_ops.*\.so$")
TARGET = {
    "implementation_name": "cpython", "platform_machine": "x86_64", "platform_system": "Linux",
    "python_full_version": "3.12.3", "python_version": "3.12", "sys_platform": "linux", "os_name": "posix",
    "platform_python_implementation": "CPython",
}  # fmt: skip


class BundleError(RuntimeError):
    """One line: what is wrong with a bundle, or could not be fetched."""


class Pin(NamedTuple):
    """A distribution at its version; ``installed_bytes`` is its size here, unpacked."""

    name: str
    version: str
    installed_bytes: int

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


def canonical(name: str) -> str:
    """Return a distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: Iterable[str], excluded: Iterable[str] = ()) -> list[Pin]:
    """Pin distributions and all they require on the target, at the versions installed here.

    Raises
    ------
    BundleError
        If one is required but not installed here.
    """
    from packaging.requirements import Requirement

    left, pins = {canonical(name) for name in excluded}, {}
    waiting = [Requirement(root) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = canonical(wanted.name), frozenset(wanted.extras)
        if name in left or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise BundleError(f"{wanted.name} is required and not installed here; run scripts/setup.sh") from None
        pins[name] = Pin(name, found.version, sum(file.size or 0 for file in found.files or ()))
        for text in found.requires or ():
            needed = Requirement(text)
            marker = needed.marker
            if marker is None or any(marker.evaluate({**TARGET, "extra": extra}) for extra in ("", *extras)):
                waiting.append(needed)
    return sorted(pins.values())


def download_command(pins: Iterable[Pin], folder: Path) -> list[str]:
    """Return the command that fetches the target's wheels of pins."""
    platforms = [f"manylinux_2_{n}_x86_64" for n in range(39, 16, -1)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", "3.12"]
    command += [word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    return [*command, "-d", str(folder), *(pin.requirement for pin in pins)]


def trim(wheel: Path, unwanted: re.Pattern[str]) -> list[str]:
    """Take members out of a wheel and of its RECORD, in place; return their names."""
    dropped, smaller = [], wheel.with_suffix(".trimmed")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            if unwanted.match(member.filename):
                dropped.append(member.filename)
                continue
            data = old.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                rows = [row for row in csv.reader(io.StringIO(data.decode())) if row and not unwanted.match(row[0])]
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(rows)
                data = text.getvalue().encode()
            new.writestr(member, data)
    smaller.replace(wheel)
    return dropped


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(files: Iterable[Path], out: Path, part_bytes: int = PART_BYTES) -> dict[str, Any]:
    """Write files as one archive cut into parts of at most ``part_bytes``, and the manifest; return the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("bundle.part-*"), out / MANIFEST):
        old.unlink(missing_ok=True)
    files = sorted(files)
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            for file in files:
                archive.add(file, arcname=file.name, filter=_anonymous)
        whole.seek(0)
        parts = []
        while data := whole.read(part_bytes):
            path = out / f"bundle.part-{len(parts):03d}"
            path.write_bytes(data)
            parts.append(_entry(path))
    manifest = {"format": 1, "python": "cp312", "cuda": "13", "parts": parts, "files": [_entry(f) for f in files]}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def unpack(bundle: Path, target: Path) -> list[Path]:
    """Check every part, then join and unpack them and check every file.

    Raises
    ------
    BundleError
        If a part or file is missing or is not what the manifest says; nothing is unpacked from a wrong part.
    """
    try:
        manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{bundle}: no {MANIFEST} there") from None
    parts = [_checked(bundle, entry) for entry in manifest["parts"]]
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target) as whole:
        for part in parts:
            with part.open("rb") as data:
                shutil.copyfileobj(data, whole)
        whole.seek(0)
        with tarfile.open(fileobj=whole) as archive:
            archive.extractall(target, filter="data")
    return [_checked(target, entry) for entry in manifest["files"]]


def install_command(files: Iterable[Path], site: Path) -> list[str]:
    """Return the command that installs unpacked wheels beside what the target has."""
    wheels = [str(file) for file in files if file.suffix == ".whl"]
    return ["python3", "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), *wheels]


def _entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "size": path.stat().st_size, "sha256": digest(path)}


def _checked(folder: Path, entry: dict[str, Any]) -> Path:
    path = folder / Path(entry["name"]).name
    if not path.is_file():
        raise BundleError(f"{entry['name']} is missing")
    if path.stat().st_size != entry["size"]:
        raise BundleError(f"{entry['name']} has {path.stat().st_size} bytes, not {entry['size']}; copy it again")
    if digest(path) != entry["sha256"]:
        raise BundleError(f"{entry['name']} is damaged: its sha256 is not the manifest's; copy it again")
    return path


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def pins_of(with_sglang: bool) -> list[Pin]:
    """Return what travels, the project itself apart."""
    if not with_sglang:
        return closure(KERNEL_ROOTS, NOT_NEEDED)
    return closure((*KERNEL_ROOTS, "sglang"))


def _listing(pins: list[Pin], trims: bool, part_bytes: int) -> Iterator[str]:
    total = sum(pin.installed_bytes for pin in pins)
    for pin in pins:
        note = "  (without flash_ops)" if trims and pin.name == "sglang-kernel" else ""
        yield f"fetch {pin.requirement}  at most {pin.installed_bytes / 1e6:.1f} MB{note}"
    if trims and any(pin.name == "sglang-kernel" for pin in pins):
        files = metadata.distribution("sglang-kernel").files or ()
        total -= sum(file.size or 0 for file in files if TRIMMED.match(str(file)))
    yield "build lethe-sglang from this tree"
    yield (
        f"{len(pins) + 1} wheels in at most {max(1, -(-total // part_bytes))} parts of {part_bytes / 1e6:g} MB: "
        "sizes are of the installed files, wheels are compressed"
    )


def pack(options: argparse.Namespace) -> int:
    """Fetch, trim, build and split, or list what that would do."""
    pins = pins_of(options.with_sglang)
    if options.dry_run:
        print("\n".join(_listing(pins, not options.keep_flash_ops, PART_BYTES)))
        return 0
    with tempfile.TemporaryDirectory(prefix="lethe-bundle-") as temporary:
        folder = Path(temporary)
        _run(download_command(pins, folder))
        build = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "-q", "--no-deps", str(ROOT)]
        _run([*build, "-w", str(folder)])
        for wheel in folder.glob("sglang_kernel-*.whl"):
            if not options.keep_flash_ops and not trim(wheel, TRIMMED):
                raise BundleError("sglang-kernel has no flash_ops to leave out; the pattern is out of date")
        manifest = split(folder.glob("*.whl"), options.out)
    size = sum(part["size"] for part in manifest["parts"])
    print(f"{len(manifest['files'])} wheels, {size / 1e6:.0f} MB in {len(manifest['parts'])} parts, in {options.out}")
    return 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise BundleError(f"pip {command[3]} failed: {lines[-1]}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["unpack"]:
            parser = argparse.ArgumentParser(prog="gpu_bundle.sh unpack", allow_abbrev=False)
            parser.add_argument("bundle", type=Path, help="folder with the parts and the manifest")
            parser.add_argument("--to", type=Path, required=True, help="folder for the wheels")
            options = parser.parse_args(arguments[1:])
            files = unpack(options.bundle, options.to)
            site = options.to / "site"
            print(f"{len(files)} files, all hashes right. Now:\n  {' '.join(install_command(files, site))}")
            print(f"  export PYTHONPATH={site} LETHE_PYTHON=python3")
            return 0
        parser = argparse.ArgumentParser(prog="gpu_bundle.sh", allow_abbrev=False)
        parser.add_argument("--with-sglang", action="store_true", help="SGLang and PyTorch too, for the parts server and greedy")
        parser.add_argument("--keep-flash-ops", action="store_true", help="FlashAttention 3 too (stock's default)")
        parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-bundle", help="folder for the parts")
        parser.add_argument("--dry-run", action="store_true", help="list what would be fetched and packed")
        return pack(parser.parse_args(arguments))
    except BundleError as error:
        print(f"gpu_bundle: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
