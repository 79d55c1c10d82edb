"""A script of sglang-router 0.3.2: each of its 98 flags does here what docs/sglang-router.md says."""

import argparse
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from sglfast.config import POLICIES, ServeConfig
from sglfast.config.fields import BY_ANY_NAME, FIELDS
from sglfast.config.flags import add_flags, given_in
from sglfast.config.sglang_router import DIFFERS, FOREIGN, OTHER_POLICIES
from sglfast.config.sources import Loaded, load
from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def _reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = _reference()
ROWS = {row["flag"]: row for row in REFERENCE.flags_of_sglang_router()}
# Flag -> (what is written there, what else it needs).
WORDS: dict[str, list[str]] = {
    "--worker-urls": ["http://worker1:8000", "http://[::1]:8000"],
    "--host": ["::"],
    "--tokenizer-path": [DEMO_TOKENIZER_PATH],
    "--model-path": [DEMO_TOKENIZER_PATH],
    "--chat-template": [__file__],
    "--prefill": ["http://prefill1:8000", "9000"],
    "--decode": ["http://decode1:8001"],
    "--log-dir": [str(ROOT)],
    "--request-id-headers": ["x-request-id", "x-trace-id"],
    "--cors-allowed-origins": ["http://localhost:3000", "https://example.com"],
    "--health-check-endpoint": ["/health_generate"],
    "--control-plane-api-keys": ["key1:Service Account:admin:secret123", "key2:Read Only:user:secret456"],
    "--api-key": ["secret"],
    "--prometheus-host": ["127.0.0.1"],
    "--rate-limit-tokens-per-second": ["100"],
    "--ca-cert-paths": [__file__],
    **{flag: [__file__] for flag in ("--client-cert-path", "--client-key-path", "--tls-cert-path", "--tls-key-path")},
}
NEEDS = {
    "--chat-template": ["--tokenizer-path", DEMO_TOKENIZER_PATH],
    "--client-cert-path": ["--client-key-path", __file__],
    "--client-key-path": ["--client-cert-path", __file__],
    "--tls-cert-path": ["--tls-key-path", __file__],
    "--tls-key-path": ["--tls-cert-path", __file__],
    "--prefill": ["--decode", "http://decode1:8001"],
    "--decode": ["--prefill", "http://prefill1:8000"],
    "--prefill-policy": ["--pd-disaggregation"],
    "--decode-policy": ["--pd-disaggregation"],
}


def start(*args: str) -> Loaded:
    parser = argparse.ArgumentParser(prog="sglfast serve")
    add_flags(parser)
    return load(given_in(parser.parse_args(args)), {})


def words_of(flag: str) -> list[str]:
    row = ROWS[flag]
    if flag in WORDS:
        return WORDS[flag]
    if row["words"] == "0":
        return []
    if row["choices"] != "-":
        return [row["choices"].split(",")[0]]
    return [row["default"] if re.fullmatch(r"-?[\d.]+", row["default"]) else "key=value"]


def default_there(flag: str, kind: type, is_list: bool) -> object:
    text = ROWS[flag]["default"]
    if text in ("None", "[]", "{}"):
        return () if is_list else None
    return text == "True" if kind is bool else kind(text)


def test_the_list_is_whole() -> None:
    assert len(ROWS) == 98
    assert "--help" not in ROWS


@pytest.mark.parametrize("flag", list(ROWS))
def test_each_flag_does_what_the_table_says(flag: str) -> None:
    table = (DOCS / "sglang-router.md").read_text()
    (row,) = re.findall(rf"^\| `{flag}` \| (same|differs|not offered) \| `(.*?)` \| (.*?) \|$", table, re.MULTILINE)
    here, default, why = row
    assert default == ROWS[flag]["default"]
    args = [flag, *words_of(flag), *NEEDS.get(flag, [])]
    if here == "not offered":
        name = flag[2:].replace("-", "_")
        refused = [word for word in ROWS[flag]["choices"].split(",") if word not in FOREIGN[name].fine]
        if ROWS[flag]["choices"] != "-":
            args = [flag, refused[0]]
        with pytest.raises(ConfigError) as caught:
            start(*args)
        message = str(caught.value)
        assert message.startswith(f"{flag}: ")
        assert why.startswith(message.removeprefix(f"{flag}: "))
        return
    loaded = start(*args)
    field = BY_ANY_NAME.get(flag[2:].replace("-", "_"))
    if field is None:
        assert here == "differs"
        assert [note for note in loaded.notes if note.startswith(f"{flag} changes nothing: ")], "what is passed over is said"
        return
    assert loaded.origins[field.name] == flag
    if here == "same":
        there = default_there(flag, field.kind, field.is_list)
        ours = field.meta.get("same_as", {}).get(field.default, field.default)
        assert ours == there or flag == "--request-id-headers", "its help says None and means a list of its own"
        assert why == ""
    else:
        assert len(why) > 10
    if ROWS[flag]["choices"] != "-":
        for choice in ROWS[flag]["choices"].split(","):
            if choice not in OTHER_POLICIES:
                start(flag, choice, *NEEDS.get(flag, []))


def test_whatever_has_another_default_differs() -> None:
    for flag in ROWS:
        field = BY_ANY_NAME.get(flag[2:].replace("-", "_"))
        if field is not None and field.default != default_there(flag, field.kind, field.is_list):
            assert field.name in DIFFERS or flag == "--request-id-headers", flag


def test_the_tables_name_nothing_else() -> None:
    theirs = {flag[2:].replace("-", "_") for flag in ROWS}
    assert set(FOREIGN) <= theirs
    assert not set(FOREIGN) & set(BY_ANY_NAME)
    assert {name for name, field in FIELDS.items() if theirs & set(field.names)} >= set(DIFFERS)
    assert theirs == set(FOREIGN) | (theirs & set(BY_ANY_NAME))


@pytest.mark.parametrize("name", sorted(OTHER_POLICIES))
def test_policies_that_are_not_offered(name: str) -> None:
    assert name not in POLICIES
    for flag in ("--policy", "--prefill-policy", "--decode-policy"):
        with pytest.raises(ConfigError, match=rf"^{flag} {name}: is not offered, .{{20,}}"):
            start(flag, name, "--pd-disaggregation")


@pytest.mark.parametrize("name", list(REFERENCE.PAGES))
def test_the_pages_are_current(name: str) -> None:
    assert (DOCS / name).read_text() == REFERENCE.PAGES[name](), "run `make docs`"


def test_the_flags_page_names_every_setting() -> None:
    page = (DOCS / "flags.md").read_text()
    for field in FIELDS.values():
        (line,) = re.findall(rf"^\| `{field.flag}`.*$", page, re.MULTILINE)
        assert ("*live*" in line) == ("live" in field.meta)
        assert ("*secret*" in line) == ("secret" in field.meta)


def test_the_example_file_of_the_flags_page(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "flags.md").read_text(), re.DOTALL)
    (tmp_path / "tokenizer.json").write_text("{}")
    path = tmp_path / "router.yaml"
    path.write_text(text.replace("/models/my-model", str(tmp_path)))
    config = start("--config", str(path)).config
    assert config != ServeConfig()
    assert (config.cb_failure_threshold, config.max_concurrent_requests, config.policy) == (3, 512, "cache_aware")
