"""Log files beside standard error: `--log-dir`, one file a day, with the lines of all processes.

Runs in: control (its own lines and its children's), shards (request lines); each appends, and the kernel keeps what one call appends in
    one piece. Contract: a file that cannot be written any more, such as on a full disk, costs its lines and nothing else; it is
    opened again with the next line.
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
        """Append whole lines. Raises OSError when they cannot be written."""
        try:
            self._open()
            while lines:
                lines = lines[os.write(self._fd, lines) :]
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Release the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
