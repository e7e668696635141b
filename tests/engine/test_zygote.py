"""What the servers of these tests do faster than others, and must not do otherwise."""

from __future__ import annotations

from conftest import WARM

PROGRAM = """
import sys
from pkgutil import resolve_name
from sglang.srt.plugins import hook_registry, load_plugins

walk = hook_registry._propagate_patch.__wrapped__
from lethe_sglang.engine.hooking import install
from lethe_sglang.engine.hooks import HOOKS
originals = {hook.target: resolve_name(hook.target) for hook in HOOKS}
def holders():
    return {(name, key) for name, module in list(sys.modules.items()) if name.startswith("sglang.")
            for key, value in list(vars(module).items()) if any(value is original for original in originals.values())}
before = holders()
load_plugins()
install(HOOKS)
left = {target: walk(original, resolve_name(target), None) for target, original in originals.items()}
print(len(before), {target: count for target, count in left.items() if count})
"""


def test_nobody_goes_on_with_a_function_that_was_hooked():
    """SGLang's own walk over all modules, put off until the index has been used, finds none."""
    done = WARM.run(["-c", PROGRAM])
    assert done.returncode == 0, done.stderr[-2000:]
    imported, left = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert int(imported) > 0 and left == "{}", "hooked functions that a module of SGLang had imported, and still has"
