"""Log files beside standard error: `--log-dir`, one file a day, with the lines of all processes.

Runs in: control (its own lines and its children's), shards (request lines); each appends, and the kernel keeps what one call appends in
    one piece. Contract: a file that cannot be written any more, such as on a full disk, costs its lines and nothing else; it is
    opened again with the next line. Whoever first opens a day's file removes the oldest beyond `--log-files-kept`; nothing else
    in the folder is touched.
"""

import contextlib
import os
import re
import time

from sglfast.errors import ConfigError

_NAME = re.compile(r"sglfast\.\d{4}-\d{2}-\d{2}\.log")


class LogFile:
    """The file of the day, `sglfast.2026-05-31.log`, appended to. kept: so many files stay, 0 = all. Raises ConfigError when the folder
    cannot be written."""

    def __init__(self, folder: str, kept: int = 0) -> None:
        self._folder = folder
        self._kept = kept
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
            name = f"sglfast.{day}.log"
            self._fd = os.open(os.path.join(self._folder, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            if day != self._day and self._kept:
                self._remove_old(name)
            self._day = day

    def _remove_old(self, present: str) -> None:
        """Remove the oldest files. Other processes do the same at the same time."""
        with contextlib.suppress(OSError):
            days = sorted(name for name in os.listdir(self._folder) if _NAME.fullmatch(name) and name != present)
            for name in days[: len(days) + 1 - self._kept]:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self._folder, name))

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
