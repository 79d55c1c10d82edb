"""config/worker_urls.py and the settings that name prefill and decode workers, in every form that they have."""

import argparse
from pathlib import Path

import pytest

from sglfast.config import ServeConfig, check
from sglfast.config.flags import add_flags, given_in
from sglfast.config.sources import Loaded, load
from sglfast.config.worker_urls import NamedWorker, named_workers, prefill_text, read_prefill
from sglfast.control.check_config import table
from sglfast.errors import ConfigError

P, Q, D, E, R = (f"http://{name}:1" for name in "pqder")
PREFILL = (f"{P} 9000", f"{Q} none")


def start(*args: str, **environment: str) -> Loaded:
    parser = argparse.ArgumentParser(prog="sglfast serve")
    add_flags(parser)
    return load(given_in(parser.parse_args(args)), environment)


def refusal(*args: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        start(*args, **environment)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "worker"),
    [
        ("http://P:1/", NamedWorker(P, "prefill")),
        ("http://p:1 9000", NamedWorker(P, "prefill", 9000, True)),
        ("  http://p:1\t 65535 ", NamedWorker(P, "prefill", 65535, True)),
        ("http://p:1 NONE", NamedWorker(P, "prefill", None, True)),
        ("https://[::1]:3 1", NamedWorker("https://[::1]:3", "prefill", 1, True)),
    ],
)
def test_forms_of_a_prefill_worker(text: str, worker: NamedWorker) -> None:
    assert read_prefill(text) == worker
    assert read_prefill(prefill_text(worker)) == worker


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"{P} 0", "the bootstrap port must be a number from 1 to 65535, or none"),
        (f"{P} 65536", "the bootstrap port must be"),
        (f"{P} x", "the bootstrap port must be"),
        (f"{P} ²", "the bootstrap port must be"),
        (f"{P} 1 2", "takes a URL and at most one port; give --prefill once for each worker"),
        ("", "takes a URL"),
        (f"9000 {P}", "--prefill 9000: must look like http://host:port"),
        (f"{P}/v1 9000", "give only scheme, host and port"),
    ],
)
def test_what_is_no_prefill_worker(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_prefill(text)
    assert str(caught.value).startswith("--prefill ")
    assert problem in str(caught.value)


def test_all_workers_of_the_settings() -> None:
    assert named_workers([R], PREFILL, [D]) == (
        NamedWorker(R),
        NamedWorker(P, "prefill", 9000, True),
        NamedWorker(Q, "prefill", None, True),
        NamedWorker(D, "decode"),
    )
    with pytest.raises(ConfigError, match=r"^--decode ftp://d: must look like"):
        named_workers([], [], ["ftp://d"])


def test_flags_in_the_form_of_sglang_router() -> None:
    flags = ["--pd-disaggregation", "--prefill", P, "9000", "--prefill", Q, "none", "--decode", D, "--decode", E]
    loaded = start(*flags, "--prefill-policy", "cache_aware_zmq", "--decode-policy", "power_of_two")
    config = loaded.config
    assert (config.prefill, config.decode, config.worker_urls) == (PREFILL, (D, E), ())
    assert (config.pd_disaggregation, config.prefill_policy, config.decode_policy) == (True, "cache_aware", "power_of_two")
    assert (config.is_pd, loaded.notes) == (True, ())
    # The switch is implied; regular workers may stand beside.
    mixed = start("--worker-urls", R, *flags[1:]).config
    assert (mixed.worker_urls, mixed.prefill, mixed.is_pd, mixed.prefill_policy) == ((R,), PREFILL, True, None)
    assert start("--pd-disaggregation").config.is_pd
    assert not start("--worker-urls", R).config.is_pd
    assert start("--pd-disaggregation", "--mini-lb").notes == (
        "--mini-lb changes nothing: the router itself spreads requests over prefill and decode workers",
    )


def test_the_twins_in_environment_and_file(tmp_path: Path) -> None:
    config = start(SGLFAST_PREFILL=f"{P} 9000, {Q} none", SGLFAST_DECODE=f"{D} {E}", SGLFAST_PD_DISAGGREGATION="true").config
    assert (config.prefill, config.decode, config.pd_disaggregation) == (PREFILL, (D, E), True)
    for name, text in (
        ("r.yaml", f"pd_disaggregation: true\nprefill: ['{P} 9000', '{Q} none']\ndecode: ['{D}', '{E}']\ndecode_policy: random\n"),
        ("r.toml", f"pd_disaggregation = true\nprefill = ['{P} 9000', '{Q} none']\ndecode = ['{D}', '{E}']\ndecode_policy = 'random'\n"),
    ):
        (tmp_path / name).write_text(text)
        loaded = start("--config", str(tmp_path / name))
        assert (loaded.config.prefill, loaded.config.decode, loaded.config.decode_policy) == (PREFILL, (D, E), "random")
        assert f"--prefill {P} 9000, {Q} none " in " ".join(table(loaded).split())
        # A flag wins over the file as a whole.
        assert start("--config", str(tmp_path / name), "--prefill", P).config.prefill == (P,)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--prefill", P], "--prefill needs --decode: a prompt that is computed must go on somewhere"),
        (["--decode", D], "--decode needs --prefill: a decode worker computes no prompt"),
        (
            ["--pd-disaggregation", "false", "--prefill", P, "--decode", D],
            "--prefill needs --pd-disaggregation, which is switched off",
        ),
        (
            ["--prefill-policy", "random"],
            "--prefill-policy needs --pd-disaggregation: without prefill and decode workers nothing is chosen by it",
        ),
        (["--worker-urls", R, "--decode-policy", "random"], "--decode-policy needs --pd-disaggregation: without prefill and decode"),
        (["--prefill-policy", "bucket"], "--prefill-policy bucket: is not offered, "),
        (["--decode-policy", "best"], "--decode-policy best: must be one of auto, "),
        (["--prefill", P, "--decode", "http://P:1/"], f"--prefill, --decode: {P} is given twice"),
        (["--worker-urls", D, "--prefill", P, "--decode", D], f"--worker-urls, --decode: {D} is given twice"),
        (["--prefill", P, "--prefill", f"{P}", "9", "--decode", D], f"--prefill: {P} is given twice"),
        (["--prefill", P, "x", "--decode", D], f"--prefill {P} x: the bootstrap port must be"),
        (["--prefill", P, "--decode", D, "--max-workers", "1"], "--prefill, --decode: 2 workers are more than --max-workers 1"),
        (["--prefill-selector", "app=p"], "--prefill-selector: service discovery is not offered"),
        (["--decode-selector", "app=d"], "--decode-selector: service discovery is not offered"),
    ],
)
def test_what_cannot_work_names_the_flag(args: list[str], text: str) -> None:
    assert refusal(*args).startswith(text)


def test_what_cannot_work_names_variable_and_key(tmp_path: Path) -> None:
    assert refusal(SGLFAST_DECODE=D).startswith("SGLFAST_DECODE needs --prefill: ")
    path = tmp_path / "r.yaml"
    path.write_text(f"prefill: ['{P} 9000']\n")
    assert refusal("--config", str(path)).startswith(f"{path}: prefill needs --decode: ")
    path.write_text(f"prefill: [['{P}', 9000]]\n")
    assert refusal("--config", str(path)).startswith(f"{path}: prefill: must be text")


def test_ranks_follow_all_workers() -> None:
    many = [word for number in range(20) for word in ("--prefill", f"http://p:{number + 1}")]
    assert start("--decode", D, *many).config.max_ranks == 128


def test_cache_settings_count_for_each_policy() -> None:
    flags = ["--prefill", P, "--decode", D, "--policy", "round_robin", "--cache-threshold", "0.4"]
    assert start(*flags).notes == ("--cache-threshold changes nothing: --policy round_robin does not look at caches",)
    assert start(*flags, "--prefill-policy", "cache_aware").notes == ()


# ---- a URL ----


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://10.0.0.5:30000", "http://10.0.0.5:30000"),
        (" http://10.0.0.5:30000/ ", "http://10.0.0.5:30000"),
        ("http://worker", "http://worker"),
        ("HTTP://Worker-1.Pool:8000", "http://worker-1.pool:8000"),
        ("http://[::1]:30000", "http://[::1]:30000"),
        ("http://[fe80::1]", "http://[fe80::1]"),
    ],
)
def test_worker_urls(text: str, url: str) -> None:
    assert check(ServeConfig(worker_urls=(text,))).worker_urls == (url,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("w:30000", "must look like http://host:port"),
        ("10.0.0.5:30000", "must look like http://host:port"),
        ("grpc://w:1", "must look like http://host:port"),
        ("", "must look like http://host:port"),
        ("http://", "must look like http://host:port"),
        ("http://:30000", "must look like http://host:port"),
        ("http://w:70000", "Port out of range 0-65535"),
        ("http://w:http", "the port must be a number"),
        ("http://w:0", "port 0 is no port that a worker can listen on"),
        ("http://a:1,http://b:1", "is more than one URL; give each as a word of its own"),
        ("http://a:1 http://b:1", "is more than one URL; give each as a word of its own"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://w:1/v1", "give only scheme, host and port, such as http://w:1"),
        ("http://w:1?x=1", "give only scheme, host and port, such as http://w:1"),
        ("http://w:1?", "give only scheme, host and port, such as http://w:1"),
        ("http://w#", "give only scheme, host and port, such as http://w:80"),
        ("http://user:secret@w:1", "give only scheme, host and port, such as http://w:1"),
        ("http://:secret@w:1", "give only scheme, host and port, such as http://w:1"),
        ("http://@w:1", "give only scheme, host and port, such as http://w:1"),
        ("http://w:", "give only scheme, host and port, such as http://w:80"),
        ("http://w w:1", "give only scheme, host and port"),
        ("http://w\n.x:1", "give only scheme, host and port"),
    ],
)
def test_wrong_worker_urls_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(ServeConfig(worker_urls=("http://ok", text)))
    message = str(caught.value)
    assert message.startswith("--worker-urls ")
    assert problem in message
