"""SIGHUP: read the settings again and take over what can change while the router runs.

Runs in: control. Contract: settings that cannot work leave everything as it was, and the log says why. What only a new start can change
    keeps its value and is named. Flags are those of the start: a file, and the files that settings name (keys, certificates), is
    what can differ.
"""

import dataclasses
import logging
from collections.abc import Callable

from sglfast.config import ServeConfig, check
from sglfast.config.fields import FIELDS
from sglfast.config.sources import Loaded
from sglfast.errors import ConfigError


class Reloader:
    """running: the settings in force; loaded: where they came from; read: reads them again, raises ConfigError;
    apply: puts new ones into force, raises ConfigError when it cannot and changes nothing then."""

    def __init__(
        self,
        running: ServeConfig,
        loaded: Loaded,
        read: Callable[[], Loaded],
        apply: Callable[[ServeConfig], None],
        log: logging.Logger,
    ) -> None:
        self._running = running
        self._given = loaded.given
        self._read = read
        self._apply = apply
        self._log = log

    def reload(self) -> None:
        """Read and apply; never raises."""
        try:
            self._take(self._read())
        except ConfigError as error:
            self._log.error(f"SIGHUP: {error}; the settings stay as they were")

    @property
    def _has_certificates(self) -> bool:
        """Whether settings name files of certificates, which may hold others now."""
        config = self._running
        return config.tls_cert_path is not None or config.client_cert_path is not None or bool(config.ca_cert_paths)

    def _take(self, loaded: Loaded) -> None:
        changed = [name for name in FIELDS if getattr(loaded.given, name) != getattr(self._given, name)]
        live = {name: getattr(loaded.given, name) for name in changed if "live" in FIELDS[name].meta}
        for note in loaded.notes if live else ():
            self._log.warning(note)
        if live or self._has_certificates:
            given = dataclasses.replace(self._given, **live)
            # What a check fills in for a setting that stays, such as the number of shards, stays too.
            kept = {name: getattr(self._running, name) for name, field in FIELDS.items() if "live" not in field.meta}
            fresh = dataclasses.replace(check(given), **kept)
            self._apply(fresh)
            self._running, self._given = fresh, given
        waiting = [FIELDS[name].flag for name in changed if name not in live]
        if waiting:
            self._log.warning("SIGHUP: these settings change only with a new start", extra={"fields": {"settings": ", ".join(waiting)}})
        applied = ", ".join(FIELDS[name].flag for name in live) or ("nothing but certificates" if self._has_certificates else "nothing")
        self._log.info("SIGHUP: settings were read again", extra={"fields": {"changed": applied}})
