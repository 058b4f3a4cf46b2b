"""The configuration of a run: read from TOML, checked as a whole before any process starts."""

from alfb_dist.config.loading import load_config, read_section
from alfb_dist.config.tables import TABLES, Config, config_to_toml, describe_fields
from alfb_dist.config.text import ConfigError

__all__ = ["TABLES", "Config", "ConfigError", "config_to_toml", "describe_fields", "load_config", "read_section"]
