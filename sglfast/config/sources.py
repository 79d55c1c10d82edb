"""Where the settings come from: flag before environment before file before default.

Runs in: control, at start and at SIGHUP. Contract: whatever is given and means nothing is refused by name, with the closest name that
    means something. `origins` says for each setting where its value comes from.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglfast.config.checks import check
from sglfast.config.fields import BY_ANY_NAME, FIELDS, Field, from_text, from_words
from sglfast.config.file import read_file
from sglfast.config.flags import Given
from sglfast.config.idle import DEFAULT, check_needs, notes_on
from sglfast.config.key_file import read_key_file
from sglfast.config.model_files import folder_of
from sglfast.config.settings import ServeConfig
from sglfast.config.sglang_router import FOREIGN, note_foreign
from sglfast.errors import ConfigError

PREFIX = "SGLFAST_"
# Variables that are no settings: of the build, of the tests, and SGLFAST_SHA=portable, which leaves a processor's SHA instructions unused.
OTHER_VARIABLES = frozenset({"SGLFAST_DEBUG", "SGLFAST_SANITIZE", "SGLFAST_CFLAGS", "SGLFAST_ONLY", "SGLFAST_TEST_SEED", "SGLFAST_SHA"})
# Kubernetes sets these in every pod beside a Service whose name begins with "sglfast"; nobody meant them as settings.
_OF_KUBERNETES = re.compile(r"SGLFAST_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_PORT_OF_KUBERNETES = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True, slots=True)
class Loaded:
    """config: checked; given: the same before the check filled anything in; origins: setting -> "--port", "SGLFAST_PORT",
    "router.yaml: port" or "default"; notes: sentences on what was accepted and changes nothing, or not what one may think."""

    config: ServeConfig
    given: ServeConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...]


def load(given: Given, environment: Mapping[str, str] = os.environ, *, may_fetch: bool = True) -> Loaded:
    """The settings of a command line, an environment and the file that either names.

    may_fetch: a tokenizer that is named but not here may be taken from the network. Raises ConfigError.
    """
    notes: list[str] = []
    from_flags = _from_flags(given, notes)
    from_environment = _from_environment(environment, notes)
    path = given["config"][-1][1][0] if "config" in given else environment.get(PREFIX + "CONFIG")
    found: dict[str, tuple[str, Any]] = {}
    if path:
        found, file_notes = read_file(path)
        notes += file_notes
    found |= from_environment | from_flags
    values = {name: value for name, (_, value) in found.items()}
    origins = {name: found[name][0] if name in found else DEFAULT for name in FIELDS}
    settings = ServeConfig(**values)
    if settings.api_key_file is not None:
        settings = dataclasses.replace(settings, api_keys=settings.api_keys + read_key_file(settings.api_key_file))
    config = check(_with_model_files(settings, may_fetch))
    check_needs(config, origins)
    return Loaded(config, settings, origins, (*notes, *notes_on(config, origins)))


def _with_model_files(settings: ServeConfig, may_fetch: bool) -> ServeConfig:
    """A model of the Hugging Face hub becomes the folder that holds its tokenizer."""
    if settings.tokenizer_path is not None:
        folder = folder_of(settings.tokenizer_path, "--tokenizer-path", may_fetch=may_fetch)
        return dataclasses.replace(settings, tokenizer_path=folder)
    if settings.model_path is not None:
        return dataclasses.replace(settings, model_path=folder_of(settings.model_path, "--model-path", may_fetch=may_fetch))
    return settings


def _from_flags(given: Given, notes: list[str]) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    for name, occurrences in given.items():
        if name in FOREIGN:
            for spelled, words in occurrences:
                note = note_foreign(FOREIGN[name], words, spelled)
                notes += [note] if note and note not in notes else []
        elif name in FIELDS:
            flag = occurrences[-1][0]
            field = FIELDS[name]
            found[name] = flag, from_words(field, [words for _, words in occurrences], flag)
            if "secret" in field.meta:
                notes.append(f"{flag} on a command line can be read by every user of this machine; {PREFIX}{name.upper()} or a file cannot")
    return found


def _from_environment(environment: Mapping[str, str], notes: list[str]) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    for variable, text in sorted(environment.items()):
        name = variable[len(PREFIX) :].lower()
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or not text or _is_of_kubernetes(variable, text):
            continue
        field: Field | None = BY_ANY_NAME.get(name) if variable == PREFIX + name.upper() else None
        if field is not None:
            if field.name in found:
                raise ConfigError(f"{variable}: is the same setting as {found[field.name][0]}; give one of them")
            found[field.name] = variable, from_text(field, text, variable)
        elif name in FOREIGN:
            note = note_foreign(FOREIGN[name], text.split(), variable)
            notes += [note] if note else []
        elif name != "config":
            close = difflib.get_close_matches(name, (*BY_ANY_NAME, "config"), n=1, cutoff=0.6)
            raise ConfigError(f"{variable}: there is no such setting" + (f"; the closest is {PREFIX}{close[0].upper()}" if close else ""))
    return found


def _is_of_kubernetes(variable: str, text: str) -> bool:
    if _OF_KUBERNETES.fullmatch(variable):
        return True
    return variable.endswith("_PORT") and _PORT_OF_KUBERNETES.match(text) is not None


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for children: they get their settings another way, and its secrets are not theirs to show."""
    return {name: text for name, text in environment.items() if name in OTHER_VARIABLES or not name.startswith(PREFIX)}
