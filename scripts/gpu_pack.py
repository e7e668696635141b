#!/usr/bin/env python3
"""Pack the environment that runs this, interpreter and all, for a GPU machine without a network.

python scripts/gpu_pack.py --nvidia DIR [--arch 90] [--out DIR] [--part-bytes N]

What is packed lies at the same paths there: ``cat parts > all``, then ``zstd -d --long=27 < all | tar xf - -C /`` (this
machine's ``zstd`` goes along). It is small enough to be copied in minutes because the machine code of other GPUs is
zeroed in the libraries, which then compress, and CUDA's own libraries are taken from the target's PyTorch of the same
CUDA, named by ``--nvidia``: its ``site-packages/nvidia``. NCCL goes along: PyTorch asks for what its own has. Packages
that a server of a plain model does not import stay behind.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

PART_BYTES = 50_000_000
LEFT = (
    *("material", "mypy", "mypyc", "babel", "nccl", "llvmlite", "numba", "pyarrow", "pandas", "tilelang", "z3"),
    *("modelscope", "matplotlib", "deepseek_recipe", "flash_mla", "mkdocs", "pip", "timm", "jedi", "anthropic"),
    *("tml_renderers", "hf_xet", "Cryptodome", "fontTools", "grpc"),
)
"""Packages that stay behind."""

UNUSED = (
    *("sgl_kernel/sm100", "nvidia_cutlass_dsl/cu12", "triton/backends/nvidia/lib/cupti*", "triton/_C/libproton.so"),
    *("triton/instrumentation", "triton/backends/nvidia/bin/ptxas-blackwell", "triton/FileCheck"),
    *("nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir.cu12*", "torch/bin/protoc*"),
    *(f"flashinfer/data/csrc/{name}*" for name in ("cake_", "kda", "gdn", "experimental", "blackwell_")),
    "flashinfer/fused_moe/backends/cudnn_frost/artifacts",
)
"""Files of packages that go along."""

SHARED = ("cu13", "cudnn", "cusparselt", "nvshmem")
"""Folders of ``nvidia`` that are the target's own."""

STRIPPED_BYTES = 100_000_000
"""Libraries above this lose their symbols, which are most of some. Smaller ones gain little, and those that wheels
brought along (``numpy.libs``) no longer load then."""

CONTAINER, PTX, CUBIN = struct.pack("<I", 0xBA55ED50), 1, 2
"""How a container of device code begins in a library, and the kinds of its entries."""


def slimmed(library: bytearray, arch: int) -> int:
    """Zero the device code of other GPUs in place; return how many bytes that were.

    A container keeps its cubin for ``arch``, else the newest of the same major version, else its newest PTX.
    """
    at, zeroed = library.find(CONTAINER), 0
    while at >= 0:
        entries, end = _entries(library, at)
        usable = [which for which, *_ in entries if which[1] <= arch]
        cubins = [which for which in usable if which[0] == CUBIN and which[1] // 10 == arch // 10]
        kept = max(cubins or [which for which in usable if which[0] == PTX], default=None)
        for which, start, length in entries:
            if which != kept:
                library[start : start + length] = bytes(length)
                zeroed += length
        at = library.find(CONTAINER, end)
    return zeroed


def _entries(library: bytearray, at: int) -> tuple[list[tuple[tuple[int, int], int, int]], int]:
    """Return kind and target, start and length of each entry of a container, and its end; none if it is none."""
    _, version, header, size = struct.unpack_from("<IHHQ", library, at)
    entries, entry, end = [], at + header, at + header + size
    if (version, header) != (1, 16) or not 0 < size <= len(library) - at - header:
        return [], at + 4
    while entry < end:
        kind, _, head, length = struct.unpack_from("<HHIQ", library, entry)
        if head < 32 or entry + head + length > end:
            return [], at + 4
        (target,) = struct.unpack_from("<I", library, entry + 28)
        entries.append(((kind, target), entry + head, length))
        entry += head + length
    return entries, end


def lay_out(root: Path, nvidia: Path, arch: int) -> None:
    """Copy the environment below ``root``, at its own paths, without what stays behind."""
    site, prefix, base = Path(sysconfig.get_path("purelib")), Path(sys.prefix), Path(sys.base_prefix)
    there = root / site.relative_to("/")
    skipped = {*LEFT, *(f"{name}.libs" for name in LEFT)}
    for path in sorted(site.iterdir()):
        if path.name in skipped or path.name == "nvidia" or "__mypyc" in path.name:
            continue
        if path.is_dir():
            shutil.copytree(path, there / path.name, symlinks=True, ignore=shutil.ignore_patterns("*.a"))
        else:
            there.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, there / path.name)
    for pattern in UNUSED:
        for path in there.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(site / "nvidia" / "nccl" / "lib", there / "nvidia" / "nccl" / "lib")
    for name in SHARED:
        (there / "nvidia" / name).symlink_to(nvidia / name)
    shutil.copytree(prefix / "bin", root / prefix.relative_to("/") / "bin", symlinks=True)
    shutil.copy2(prefix / "pyvenv.cfg", root / prefix.relative_to("/"))
    without = shutil.ignore_patterns("site-packages", "test", "idlelib", "config-3*", "*.a", "__pycache__")
    shutil.copytree(base, root / base.relative_to("/"), symlinks=True, ignore=without)
    for library in (path for path in there.rglob("*.so*") if path.is_file() and not path.is_symlink()):
        data = bytearray(library.read_bytes())
        if slimmed(data, arch):
            library.write_bytes(data)
        if len(data) > STRIPPED_BYTES:
            subprocess.run(["strip", "--strip-unneeded", str(library)], check=False, capture_output=True)


def main() -> int:
    """Pack, and say how much it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nvidia", type=Path, required=True, help="site-packages/nvidia of the target's PyTorch")
    parser.add_argument("--arch", type=int, default=90, help="compute capability of the target, times ten")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-pack"), help="folder of the parts (%(default)s)")
    parser.add_argument("--part-bytes", type=int, default=PART_BYTES, help="largest part (%(default)s)")
    args = parser.parse_args()
    zstd = shutil.which("zstd")
    if zstd is None:
        parser.error("zstd is not on the PATH; install it")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out}: not empty; give another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    root = args.out / "root"
    lay_out(root, args.nvidia, args.arch)
    tar = subprocess.Popen(["tar", "cf", "-", "-C", str(root), "."], stdout=subprocess.PIPE)
    packed = subprocess.Popen([zstd, "-q", "-11", "-T0", "--long=27"], stdin=tar.stdout, stdout=subprocess.PIPE)
    assert packed.stdout is not None
    sizes = []
    while data := packed.stdout.read(args.part_bytes):
        (args.out / f"part-{len(sizes):02d}").write_bytes(data)
        sizes.append(len(data))
    if tar.wait() or packed.wait():
        print("gpu_pack: error: tar or zstd failed; see above", file=sys.stderr)
        return 1
    shutil.copy2(zstd, args.out / "zstd")
    shutil.rmtree(root)
    print(f"{sum(sizes) / 1e6:.0f} MB in {len(sizes)} parts of at most {args.part_bytes / 1e6:g} MB, in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
