"""The settings of `sglfast serve`: `settings` says which there are, `fields` what they mean, `checks` what cannot work, and the
other modules where they come from. Children of control get them ready-made and need only what this module names."""

from sglfast.config.checks import check
from sglfast.config.settings import POLICIES, REQUEST_ID_HEADERS, ServeConfig, from_json, to_json

__all__ = ["POLICIES", "REQUEST_ID_HEADERS", "ServeConfig", "check", "from_json", "to_json"]
