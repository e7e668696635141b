"""The section of the policy in use: ``policy: snapkv`` and, if need be, ``snapkv: {...}``, checked by the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from lethe_sglang.config.errors import KnownKeys, explain, fields_of, known_keys
from lethe_sglang.config.section import Section
from lethe_sglang.errors import ConfigError, show
from lethe_sglang.policies import Policy, policy_class, policy_names

DEFAULT_POLICY = "lethe"


class Chosen(NamedTuple):
    """The policy that a configuration's mapping asks for, and all that is wrong with how it does."""

    policy: Policy | None
    sections: dict[str, type[Policy]]
    problems: list[str]


def choose(data: Mapping[Any, Any], known: KnownKeys) -> Chosen:
    """Build the policy that ``data`` names with the options in the section of that name.

    Parameters
    ----------
    data
        The content of a configuration.
    known
        The keys of the other sections, to say where an unknown one belongs.

    Returns
    -------
    Chosen
        ``policy`` is None if there are problems or ``policy`` is no name at all; ``sections`` are the name and class
        of the policy, empty if there is none.
    """
    name = data.get("policy", DEFAULT_POLICY)
    if not isinstance(name, str) or not name:
        return Chosen(None, {}, [])
    problems = [
        f"{other}: is the section of another policy, this configuration uses {name}; "
        f"leave it out or write policy: {other}"
        for other in data
        if other != name and other in policy_names()
    ]
    try:
        kind = policy_class(name)
    except ConfigError as error:
        return Chosen(None, {}, [str(error)])
    given = data.get(name, {})
    options = fields_of(kind)
    if not isinstance(given, Mapping):
        keys = f"a mapping with keys among {', '.join(options)}" if options else "nothing, it has no options"
        return Chosen(None, {name: kind}, [*problems, f"{name}: got {show(given)}, expected {keys}"])
    policy = None
    try:
        policy = kind(**{str(key): value for key, value in given.items()})
        _ = policy.accumulation  # computed from the options, perhaps by somebody else's code
    except ValidationError as error:
        problems += explain(error, kind, name, {**known, name: tuple(options)})
    except Exception as error:
        problems.append(f"{name}: {type(error).__name__}: {error}")
    return Chosen(policy, {name: kind}, problems)


def laid_over(base: Mapping[str, Any], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a configuration's mapping over another, section by section.

    Where that changes the policy, the section of the old one goes, and the new one has its defaults unless given.
    """
    merged = dict(base)
    before = base.get("policy", DEFAULT_POLICY)
    if isinstance(before, str) and mapping.get("policy", before) != before:
        merged.pop(before, None)
    for name, value in mapping.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if both else value
    return merged


class WithPolicy(Section):
    """The section of the policy in use is read into ``built_policy``, and dumped with all its options."""

    policy: str = Field(
        default=DEFAULT_POLICY,
        min_length=1,
        description="Name of the policy that ranks tokens; a section of that name sets its options.",
    )
    _built: Policy = PrivateAttr()

    @property
    def built_policy(self) -> Policy:
        """The policy in use, with its options."""
        return self._built

    @model_validator(mode="wrap")
    @classmethod
    def _read_policy(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Read the policy's section beside the others, so that one error names what is wrong in any of them."""
        if not isinstance(data, Mapping):
            return handler(data)
        chosen = choose(data, known_keys(cls))

        def found(problems: list[str]) -> list[InitErrorDetails]:
            errors = [ValueError(problem) for problem in problems]
            return [InitErrorDetails(type="value_error", input=data, ctx={"error": error}) for error in errors]

        findings = found(chosen.problems)
        try:
            config = handler({key: value for key, value in data.items() if key not in policy_names()})
        except ValidationError as error:
            findings += error.errors()  # type: ignore[arg-type]
        if not findings:
            assert chosen.policy is not None
            config._built = chosen.policy
            findings = found(config.policy_problems())
        if findings:
            raise ValidationError.from_exception_data(cls.__name__, findings)
        return config

    def policy_problems(self) -> list[str]:
        """Say what is wrong with the policy beside what the other sections say."""
        return []

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        options = asdict(self._built)  # type: ignore[call-overload]
        return {"policy": self.policy, **({self.policy: options} if options else {}), **handler(self)}
