"""sglfast.config.model_files: a path stays a path; a name of the Hugging Face hub becomes a folder of its cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglfast.config.model_files import folder_of
from sglfast.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["/no/such/folder", "relative/there/is/none", "one-word", "./org/model", str(ROOT), "a b/c"])
def test_paths_stay_as_they_are(name: str) -> None:
    assert folder_of(name, "--model-path") == name


def ask(cache: Path, name: str) -> list[str]:
    """(folder, error) that another process finds: the library reads its environment once."""
    code = (
        "import json, sys; from sglfast.config.model_files import folder_of; from sglfast.errors import ConfigError\n"
        "try: print(json.dumps([folder_of(sys.argv[1], '--model-path'), '']))\n"
        "except ConfigError as error: print(json.dumps(['', str(error)]))"
    )
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def test_without_the_network_only_the_cache_counts() -> None:
    with pytest.raises(
        ConfigError, match=r"^--model-path no-such-org/no-such-model: no such folder, and not in the cache of the Hugging Face"
    ):
        folder_of("no-such-org/no-such-model", "--model-path", may_fetch=False)


def snapshot(cache: Path, name: str, *files: str) -> Path:
    """A model in the hub's cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""
    model = cache / "hub" / f"models--{name.replace('/', '--')}"
    folder = model / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_a_model_in_the_cache_is_found_without_a_network(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "org/model", "tokenizer.json", "tokenizer_config.json")
    assert ask(tmp_path, "org/model") == [str(folder), ""]


def test_a_model_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    folder, error = ask(tmp_path, "org/model")
    assert not folder
    assert error.startswith("--model-path org/model: no such folder, and the Hugging Face hub does not give it: ")
    assert "\n" not in error


def test_a_model_without_a_tokenizer_file(tmp_path: Path) -> None:
    snapshot(tmp_path, "org/model", "config.json")
    _, error = ask(tmp_path, "org/model")
    assert error == "--model-path org/model: this model of the Hugging Face hub has no tokenizer.json"
