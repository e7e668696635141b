"""What the user may configure: the schema, how a configuration is found and read, and what one request may change."""

from lethe_sglang.config.loading import from_mapping, presets, resolve
from lethe_sglang.config.overrides import RequestOverride, parse_override, parse_request
from lethe_sglang.config.schema import EvictionConfig
from lethe_sglang.errors import ConfigError

__all__ = [
    "ConfigError",
    "EvictionConfig",
    "RequestOverride",
    "from_mapping",
    "parse_override",
    "parse_request",
    "presets",
    "resolve",
]
