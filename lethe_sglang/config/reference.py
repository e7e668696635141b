"""``docs/configuration.md``, written from the descriptions of the options: the schema's, then every policy's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

from pydantic.fields import FieldInfo

from lethe_sglang.config.errors import fields_of
from lethe_sglang.config.schema import EvictionConfig
from lethe_sglang.config.section import Section
from lethe_sglang.errors import ConfigError, show
from lethe_sglang.policies import policy_class

_HEAD = """# Configuration

This page is generated: `lethe show --options > docs/configuration.md`.

A configuration is a YAML or JSON file, JSON text, or the name of a preset, given as `--kv-evict-config`; what it leaves
out has its default. `lethe show --kv-evict-config FILE` prints what it resolves to. A key that does not exist, a value
out of range, or the section of a policy that is not in use is an error that names the key and what is legal."""

_POLICIES = """## Policies

`policy: NAME` chooses one, and `--kv-evict NAME` beats it; a section of that name sets its options. Only the section of
the policy in use may be given: where the flag changes the policy, the section of the file's own policy is left out.
Other distributions can register policies ([how](adding-a-policy.md)); `lethe show --policies` lists theirs, too."""


def configuration_page(policies: Iterable[str]) -> str:
    """Write the whole page in Markdown, with the sections of ``policies``."""
    plain: dict[str, FieldInfo] = {}
    sections: list[str] = []
    for name, field in fields_of(EvictionConfig).items():
        kind = field.annotation
        if inspect.isclass(kind) and issubclass(kind, Section):
            sections += [f"### {name}", str(field.description), _table(f"{name}.", fields_of(kind))]
        else:
            plain[name] = field
    return "\n\n".join([_HEAD, "## Options", _table("", plain), *sections, policies_page(policies)])


def policies_page(policies: Iterable[str]) -> str:
    """Write what each of ``policies`` keeps, its paper and its options in Markdown; why, if one cannot be used."""
    parts = [_POLICIES]
    for name in policies:
        try:
            kind = policy_class(name)
        except ConfigError as error:
            parts += [f"### {name}", str(error)]
            continue
        summary = " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split()).replace("``", "`")
        options = fields_of(kind)
        parts += [f"### {name}", f"{summary} {kind.source}.", _table(f"{name}.", options) if options else "No options."]
    return "\n\n".join(parts)


def _table(prefix: str, fields: Mapping[str, FieldInfo]) -> str:
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        shown = default if isinstance(default, str) else show(default)
        meaning = " ".join(str(field.description).split()).replace("|", "\\|")
        lines.append(f"| `{prefix}{name}` | `{shown}` | {meaning} |")
    return "\n".join(lines)
