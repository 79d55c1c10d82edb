"""Where a model's tokenizer is: a folder or file of this machine, or a name of the Hugging Face hub.

Runs in: control, at start and at SIGHUP. Contract: the hub's own cache is asked first, the network only when the name is not there
    (never with HF_HUB_OFFLINE=1). Only what tokenizing needs is fetched.
"""

import os
import re

from sglfast.errors import ConfigError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def folder_of(name: str, flag: str, *, may_fetch: bool = True) -> str:
    """The path that holds the tokenizer `name`; a path is returned as it is. may_fetch: the network may be asked. Raises ConfigError."""
    if os.path.exists(name) or not _HUB_NAME.fullmatch(name) or name.startswith("."):
        return name
    # Late: only those who name a model of the hub pay for the library.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=_PATTERNS, local_files_only=True)
        if os.path.exists(os.path.join(folder, "tokenizer.json")):
            return folder
    except Exception:
        pass  # not in the cache
    if not may_fetch:
        raise ConfigError(f"{flag} {name}: no such folder, and not in the cache of the Hugging Face hub")
    try:
        folder = snapshot_download(name, allow_patterns=_PATTERNS)
    except Exception as error:  # the library's own, and those of its HTTP client
        first_line = str(error).strip().splitlines()[:1]
        reason = first_line[0] if first_line else type(error).__name__
        raise ConfigError(f"{flag} {name}: no such folder, and the Hugging Face hub does not give it: {reason}") from None
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        raise ConfigError(f"{flag} {name}: this model of the Hugging Face hub has no tokenizer.json")
    return folder
