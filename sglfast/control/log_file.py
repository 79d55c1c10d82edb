"""Log files beside standard error: `--log-dir`, one file a day, with the lines of all processes.

Runs in: control, the only writer: the children's lines come through its pipes (children.py). Contract: a file that cannot be written any
    more, such as on a full disk, costs its lines and nothing else; it is opened again with the next line.
"""

import contextlib
import os
import time

from sglfast.errors import ConfigError


class LogFile:
    """The file of the day, `sglfast.2026-05-31.log`, appended to. Raises ConfigError when the folder cannot be written."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._day = ""
        self._fd = -1
        try:
            os.makedirs(folder, exist_ok=True)
            self._open()
        except OSError as error:
            raise ConfigError(f"--log-dir {folder}: cannot be written ({error.strerror})") from None

    def _open(self) -> None:
        day = time.strftime("%Y-%m-%d")
        if day != self._day or self._fd < 0:
            self.close()
            self._fd = os.open(
                os.path.join(self._folder, f"sglfast.{day}.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640
            )
            self._day = day

    def write_lines(self, lines: bytes) -> None:
        """Append whole lines."""
        try:
            self._open()
            while lines:
                lines = lines[os.write(self._fd, lines) :]
        except OSError:
            self.close()

    def write(self, text: str) -> None:
        """Append text; with `flush`, what a logging handler needs."""
        self.write_lines(text.encode(errors="replace"))

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Release the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
