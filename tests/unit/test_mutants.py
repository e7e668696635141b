"""The places that mutants break are still there: a mutant that fits nowhere any more breaks nothing."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_mutant_finds_its_one_place_and_its_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    mutants = __import__("mutants").MUTANTS
    sys.modules.pop("mutants")
    astray = {
        name: found
        for name, mutant in mutants.items()
        if (found := (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)) != 1
    }
    assert not astray, "how often the place to break is there"
    named = {word.partition("::")[0] for mutant in mutants.values() for word in shlex.split(mutant.tests)}
    assert not [word for word in named if word.startswith("tests/") and not (ROOT / word).exists()]
    assert len(mutants) > 300
