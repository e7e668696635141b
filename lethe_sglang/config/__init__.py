"""What the user may configure: the schema, how a configuration is found and read, and what one request may change."""

from lethe_sglang.config.errors import ConfigError
from lethe_sglang.config.loading import from_mapping, presets, resolve
from lethe_sglang.config.overrides import RequestOverride, parse_request
from lethe_sglang.config.schema import (
    BudgetConfig,
    DebugConfig,
    EvictionConfig,
    RasrConfig,
    RequestsConfig,
    RetainConfig,
    RoundsConfig,
)

__all__ = [
    "BudgetConfig",
    "ConfigError",
    "DebugConfig",
    "EvictionConfig",
    "RasrConfig",
    "RequestOverride",
    "RequestsConfig",
    "RetainConfig",
    "RoundsConfig",
    "from_mapping",
    "parse_request",
    "presets",
    "resolve",
]
