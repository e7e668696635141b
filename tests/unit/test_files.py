"""Files that a killed process leaves behind, and arguments that a command keeps to itself."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest

from lethe_bench.cli import server_args
from lethe_sglang.config import ConfigError
from lethe_sglang.files import Journal, read_lines, replacing, write_atomically


def test_a_journal_is_read_as_it_was_written(tmp_path):
    journal = Journal(tmp_path / "new" / "j.jsonl")
    assert journal.read() == []
    journal.add([{"a": 1}, {"b": "ü"}])
    journal.add([])
    journal.add([{"c": 3}])
    assert journal.read() == read_lines(journal.path) == [{"a": 1}, {"b": "ü"}, {"c": 3}]
    journal.start([{"d": 4}])
    assert journal.read() == [{"d": 4}]
    journal.remove()
    assert journal.read() == [] and not list(journal.path.parent.iterdir())


def test_a_torn_line_is_not_read_and_cut_off_before_the_next_one(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.add([{"a": 1}])
    with journal.path.open("a") as file:
        file.write('{"b": 2')
    assert journal.read() == [{"a": 1}]
    journal.add([{"c": 3}])
    assert journal.read() == [{"a": 1}, {"c": 3}] and journal.path.read_bytes().count(b"\n") == 2


def test_damage_that_no_kill_leaves_is_an_error(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(ValueError):
        read_lines(tmp_path / "j.jsonl")


def test_records_below_another_header_are_of_another_job(tmp_path):
    mine, other = (Journal(tmp_path / "j.jsonl", {"job": name}) for name in ("mine", "other"))
    mine.add([{"a": 1}])
    mine.add([{"b": 2}])
    assert mine.read() == [{"a": 1}, {"b": 2}] and other.read() == []
    other.start([{"c": 3}])
    assert other.read() == [{"c": 3}] and mine.read() == []


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_of_a_failure(tmp_path):
    write_atomically(tmp_path / "a" / "f", "old")
    write_atomically(tmp_path / "a" / "f", "new")
    assert (tmp_path / "a" / "f").read_text() == "new" and len(list((tmp_path / "a").iterdir())) == 1
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "d", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "d"}


@contextmanager
def room_for(size: int):
    """Let no file get larger than that: as on a full disk, the kernel takes a part of the write that crosses it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_disk_has_no_room_for_is_an_error_and_leaves_nothing_behind(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.add([{"a": 1}])
    before = journal.path.read_bytes()
    with room_for(len(before) + 10), pytest.raises(OSError):
        journal.add([{"b": "x" * 100}])
    assert journal.path.read_bytes() == before, "a torn line, or a lost one that nobody was told of"
    journal.add([{"c": 3}])
    assert journal.read() == [{"a": 1}, {"c": 3}]
    with room_for(10), pytest.raises(OSError):
        write_atomically(tmp_path / "f", "x" * 100)
    with room_for(10), pytest.raises(OSError), replacing(tmp_path / "f") as out:
        out.write(b"x" * 100)
    assert [path.name for path in tmp_path.iterdir()] == ["j.jsonl"]


OWN = {"--model-path": "use --model-path of lethe x", "--port": "", "--kv-evict": "use --policy of lethe x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--tp 2 --port 1", "--server-args: '--port' is set by lethe x; leave it out"),
        ("--model-path=m", "--server-args: '--model-path=m' is set by lethe x; use --model-path of lethe x"),
        ("--model m", "'--model' is set by lethe x; use --model-path of lethe x"),
        ("--por 1", "'--por' is set by lethe x; leave it out"),
        ("--kv-evict lethe", "'--kv-evict' is set by lethe x; use --policy of lethe x"),
        ("--kv-evict-profile auto", "'--kv-evict-profile' is set by lethe x; leave it out"),
        ("--kv-evict-anything-new", "'--kv-evict-anything-new' is set by lethe x; leave it out"),
        (
            "--dp-size 2",
            "--server-args: '--dp-size': lethe x measures one replica, and would report the first; leave it out",
        ),
        ("--dp=2", "'--dp=2': lethe x measures one replica"),
        ("--data-parallel-size 2", "'--data-parallel-size': lethe x measures one replica"),
        ("'", '--server-args "\'": No closing quotation; quote each argument as in a shell'),
    ],
)
def test_what_a_command_sets_itself_is_refused_abbreviated_or_not(text, message):
    with pytest.raises(ConfigError) as error:
        server_args.split(text, "lethe x", OWN)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_all_other_arguments_are_passed_on():
    words = ("--tp", "2", "--kv-cache-dtype", "auto", "--model-loader-extra-config", "a b", "-x")
    assert (
        server_args.split("--tp 2 --kv-cache-dtype auto --model-loader-extra-config 'a b' -x", "lethe x", OWN) == words
    )
