"""sglfast.prompt.train: the shipped demo tokenizer is what the script makes."""

import json
import platform
from pathlib import Path

import pytest

from sglfast.prompt import train
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

# The corpus is the standard library of the running Python, so other versions make another vocabulary.
TRAINED_WITH_PYTHON = "3.11.7"


def test_shipped_config_has_the_template_of_the_script() -> None:
    config = json.loads((Path(DEMO_TOKENIZER_PATH) / "tokenizer_config.json").read_bytes())
    assert config["chat_template"] == train.CHAT_TEMPLATE


@pytest.mark.skipif(platform.python_version() != TRAINED_WITH_PYTHON, reason=f"trained with Python {TRAINED_WITH_PYTHON}")
def test_shipped_files_are_what_the_script_writes(tmp_path: Path) -> None:
    train.write_folder(tmp_path)
    for file in Path(DEMO_TOKENIZER_PATH).iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
