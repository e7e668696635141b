"""The bundle for a GPU machine: what is packed, and that nothing wrong is unpacked."""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import gpu_bundle as bundle


def packed(tmp_path, part_bytes=5000):
    source = tmp_path / "source"
    source.mkdir()
    for name, size in (("a.whl", 12_000), ("b.whl", 0), ("c.whl", 700)):
        (source / name).write_bytes(bytes(i * i % 251 for i in range(size)))
    return source, bundle.split(source.iterdir(), tmp_path / "bundle", part_bytes)


def test_parts_are_small_and_give_the_files_back(tmp_path):
    source, manifest = packed(tmp_path)
    parts = sorted((tmp_path / "bundle").glob("bundle.part-*"))
    assert [part["name"] for part in manifest["parts"]] == [part.name for part in parts] and len(parts) > 3
    assert all(0 < part.stat().st_size <= 5000 for part in parts) and bundle.PART_BYTES <= 60_000_000
    assert all(part["size"] == 5000 for part in manifest["parts"][:-1])
    files = bundle.unpack(tmp_path / "bundle", tmp_path / "target")
    assert {f.name: f.read_bytes() for f in files} == {f.name: f.read_bytes() for f in source.iterdir()}
    again = bundle.split(source.iterdir(), tmp_path / "bundle", 50_000)
    assert len(again["parts"]) == 1 and len(list((tmp_path / "bundle").glob("bundle.part-*"))) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_wrong_part_is_refused_before_anything_is_unpacked(tmp_path, capsys, damage):
    packed(tmp_path)
    part = tmp_path / "bundle" / "bundle.part-001"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data if damage == "flip" else data[:-1])
    if damage == "remove":
        part.unlink()
    target = tmp_path / "target"
    assert bundle.main(["unpack", str(tmp_path / "bundle"), "--to", str(target)]) == 1
    assert "bundle.part-001" in capsys.readouterr().err and not target.exists()


def test_a_file_with_a_wrong_hash_is_refused(tmp_path):
    _, manifest = packed(tmp_path)
    manifest["files"][0]["sha256"] = "0" * 64
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(bundle.BundleError, match=r"a\.whl is damaged"):
        bundle.unpack(tmp_path / "bundle", tmp_path / "target")


def test_flash_ops_is_taken_out_of_a_wheel_and_of_its_record(tmp_path):
    wheel = tmp_path / "sglang_kernel-0-py3-none-any.whl"
    record = "sgl_kernel/flash_ops.abi3.so,sha256=x,9\nsgl_kernel/flash_attn.py,sha256=y,1\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("sgl_kernel/flash_ops.abi3.so", "too large")
        file.writestr("sgl_kernel/flash_attn.py", "1")
        file.writestr("sglang_kernel-0.dist-info/RECORD", record)
    assert bundle.trim(wheel, bundle.TRIMMED) == ["sgl_kernel/flash_ops.abi3.so"]
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == ["sgl_kernel/flash_attn.py", "sglang_kernel-0.dist-info/RECORD"]
        assert file.read("sglang_kernel-0.dist-info/RECORD").decode() == record.splitlines(True)[1]


def test_a_bundles_dry_run_lists_and_fetches_nothing(monkeypatch, capsys, tmp_path):
    pins = [bundle.Pin("one", "1.0", 50_000_000), bundle.Pin("two", "2.0", 50_000_000)]
    monkeypatch.setattr(bundle, "pins_of", lambda with_sglang: pins if with_sglang else pins[:1])
    monkeypatch.setattr(bundle, "_run", lambda command: pytest.fail("a dry run ran something"))
    assert bundle.main(["--dry-run", "--with-sglang", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "fetch one==1.0" in out and "fetch two==2.0" in out and "3 wheels in at most 2 parts of 60 MB" in out
    assert bundle.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "two" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_only_what_the_target_needs_is_pinned(monkeypatch):
    requires = {
        "root": ["torch==1", "Small_One>=1", "extra-only; extra == 'x'", "windows; sys_platform == 'win32'"],
        "small-one": ["other[x]; python_version >= '3.12'"],
        "other": ["more; extra == 'x'", "none; extra == 'y'"],
        "more": [],
    }

    def distribution(name):
        return argparse.Namespace(version="1", files=None, requires=requires[name])

    monkeypatch.setattr(bundle.metadata, "distribution", distribution)
    assert [pin.requirement for pin in bundle.closure(["root"], ["torch"])] == [
        "more==1",
        "other==1",
        "root==1",
        "small-one==1",
    ]
