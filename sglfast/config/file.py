"""The settings file: YAML or TOML, in sgl-router's form, or with our own names at the top level, or both.

Runs in: control, at start and at SIGHUP. Source of the sections: spec/router.md 2.1 (server, observability, models, discovery, proxy,
    active_load). Contract: every setting is also a top-level key of its own name; a key that means nothing, and one given
    twice, is refused by name. Values have their own type: `port: "80"` is text and no port.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglfast.config.fields import BY_ANY_NAME, FIELDS, from_file
from sglfast.config.sglang_router import FOREIGN, note_foreign
from sglfast.config.text_file import read_text
from sglfast.errors import ConfigError

_LIMIT_BYTES = 1 << 20
_SECTIONS = {field.meta["section"]: field for field in FIELDS.values() if "section" in field.meta}
_FOLDERS = {path.rpartition(".")[0] for path in _SECTIONS} | {"discovery"}
_KNOWN = {*BY_ANY_NAME, *FOREIGN, *_SECTIONS, "models.id", "discovery.backend", "discovery.k8s"}
_BACKENDS = ("static_urls", "k8s")


def read_file(path: str) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """(setting -> (where it stands, value), notes on what changes nothing). Raises ConfigError."""
    tree = _parse(path)
    found: dict[str, tuple[str, Any]] = {}
    notes: list[str] = []
    for key, value in _leaves(path, tree, ""):
        where = f"{path}: {key}"
        if key == "discovery.backend":
            _check_backend(where, value, tree)
        elif key == "discovery.k8s":
            raise ConfigError(f"{where}: {FOREIGN['service_discovery'].why}")
        elif key == "models.id":
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"{where}: must be the name of a model")
            notes.append(f"{where} changes nothing: the workers tell the names of their models")
        elif key in FOREIGN:
            words = value if isinstance(value, list) else [value]
            note = note_foreign(FOREIGN[key], [_as_word(word) for word in words], where)
            notes += [note] if note else []
        else:
            field = _SECTIONS.get(key) or BY_ANY_NAME[key]
            if field.name in found:
                raise ConfigError(f"{where}: is the same setting as {found[field.name][0].removeprefix(path + ': ')}; give one of them")
            found[field.name] = where, from_file(field, value, where)
    return found, notes


def _as_word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(path: str, tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """(dotted key, value) of every known key, folders walked through."""
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key == "models":
            value = _only_model(path, value)
        if key in _FOLDERS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}: {key}: must hold keys of its own, such as {_example(key)}")
            found += _leaves(path, value, f"{key}.")
        elif key in _KNOWN:
            found.append((key, value))
        else:
            raise ConfigError(f"{path}: {key}: there is no such setting{_closest(key)}")
    return found


def _only_model(path: str, value: Any) -> Any:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: models: must be a list")
    if len(value) != 1:
        raise ConfigError(
            f"{path}: models: must have one entry; all models share one tokenizer and one policy, their names come from the workers"
        )
    return value[0]


def _check_backend(where: str, value: Any, tree: Mapping[str, Any]) -> None:
    if value not in _BACKENDS:
        raise ConfigError(f"{where}: must be one of {', '.join(_BACKENDS)}, is {value!r}")
    if value == "k8s":
        raise ConfigError(f"{where}: {FOREIGN['service_discovery'].why}")
    if "static_urls" not in tree["discovery"]:
        raise ConfigError(f"{where}: static_urls needs the section discovery.static_urls with the list urls")


def _example(folder: str) -> str:
    return next((key for key in sorted(_KNOWN) if key.startswith(f"{folder}.")), folder)


def _closest(key: str) -> str:
    found = difflib.get_close_matches(key.replace("-", "_"), _KNOWN, n=1, cutoff=0.6)
    return f"; the closest is {found[0]}" if found else ""


def _parse(path: str) -> Mapping[str, Any]:
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ConfigError(f"--config {path}: the name must end in .yaml, .yml or .toml")
    text = read_text("--config", path, _LIMIT_BYTES)
    tree = _from_toml(path, text) if suffix == ".toml" else _from_yaml(path, text)
    if not isinstance(tree, Mapping) or not all(isinstance(name, str) for name in tree):
        raise ConfigError(f"--config {path}: must hold `name: value` pairs")
    return tree


def _from_toml(path: str, text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path}: is no TOML: {error}") from None


def _from_yaml(path: str, text: str) -> Any:
    from sglfast.config.yaml_text import parse_yaml  # PyYAML is loaded by those who have such a file

    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--config {path}: is no YAML: {error}") from None
    return {} if tree is None else tree
