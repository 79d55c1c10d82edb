"""modelexpress/identity.py: both forms of SGLang's identity, against ids that real code and the golden rules give."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglfast.errors import ConfigError
from sglfast.modelexpress.identity import ServerArguments, arguments_identity, loader_identity, loader_rank
from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.source_id import source_id


def vector(golden: Path, file: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in json.loads((golden / "modelexpress" / file).read_text())["vectors"] if one["name"] == name)
    return found


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sglang_pr21222_auto", {"model_path": "Qwen/Qwen2.5-7B-Instruct", "tp_size": 2}),
        ("sglang_pr21222_fp8_tp8", {"model_path": "deepseek-ai/DeepSeek-V3", "tp_size": 8, "quantization": "fp8"}),
        ("sglang_pr21222_bf16", {"model_path": "Qwen/Qwen2.5-7B-Instruct", "tp_size": 2, "dtype": "bfloat16"}),
    ],
)
def test_server_arguments_form(golden: Path, name: str, arguments: dict[str, Any]) -> None:
    identity = arguments_identity(ServerArguments(**arguments))
    assert source_id(identity, form="april") == vector(golden, "source_id_2026_04.json", name)["mx_source_id"]


def test_server_arguments_form_on_a_current_server(golden: Path) -> None:
    wanted = vector(golden, "source_id_current.json", "sglang_pr21222_auto_dtype_on_new_server")
    arguments = ServerArguments(model_path="/data/qwen", tp_size=2)
    identity = arguments_identity(arguments, model_name="Qwen/Qwen2.5-7B-Instruct")
    assert source_id(identity) == wanted["mx_source_id"]
    assert identity.SerializeToString(deterministic=True).hex() == wanted["serialized_identity_hex"]


@pytest.mark.parametrize(
    ("name", "arguments", "loaded"),
    [
        ("sglang_0_7_0_package_loader", {"tp_size": 8}, {"dtype": "torch.bfloat16"}),
        ("sglang_0_7_0_fp8_tp16_pp2", {"tp_size": 16, "pp_size": 2}, {"dtype": "bfloat16", "quantization": "fp8", "revision": "main"}),
        ("sglang_0_7_0_fp8_tp16_pp2", {"tp_size": 16, "pp_size": 2, "quantization": "fp8", "revision": "main"}, {"dtype": "bfloat16"}),
    ],
)
def test_package_loader_form(golden: Path, name: str, arguments: dict[str, Any], loaded: dict[str, Any]) -> None:
    wanted = vector(golden, "source_id_current.json", name)
    identity = loader_identity(ServerArguments(model_path="deepseek-ai/DeepSeek-V3", **arguments), mx_version="0.7.0", **loaded)
    assert source_id(identity) == wanted["mx_source_id"]
    assert identity.SerializeToString(deterministic=True).hex() == wanted["serialized_identity_hex"]


def test_the_forms_never_match() -> None:
    arguments = ServerArguments(model_path="m", dtype="bfloat16")
    assert source_id(arguments_identity(arguments)) != source_id(loader_identity(arguments, mx_version="0.7.0", dtype="bfloat16"))


def test_a_package_dtype_is_that_of_a_loaded_model() -> None:
    for dtype in ("auto", "", "torch."):
        with pytest.raises(ConfigError, match="loaded model's, as bfloat16"):
            loader_identity(ServerArguments(model_path="m"), mx_version="0.7.0", dtype=dtype)


def test_arguments_of_a_running_server() -> None:
    """As in /server_info: all of hundreds of arguments, some of them null."""
    info = {
        "model_path": "m",
        "tp_size": 4,
        "pp_size": 2,
        "ep_size": 4,
        "dtype": "auto",
        "quantization": None,
        "revision": None,
        "port": 30000,
    }
    arguments = ServerArguments.from_mapping(info)
    assert arguments == ServerArguments(model_path="m", tp_size=4, pp_size=2, ep_size=4)
    identity = arguments_identity(arguments)
    assert (identity.tensor_parallel_size, identity.pipeline_parallel_size, identity.expert_parallel_size) == (4, 2, 4)
    assert identity.backend_framework == p2p.BACKEND_FRAMEWORK_SGLANG


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model_path is missing"),
        ({"model_path": None}, "model_path is missing"),
        ({"model_path": ""}, "model_path is empty"),
        ({"model_path": 7}, "model_path 7: must be text"),
        ({"model_path": "m", "tp_size": "2"}, "tp_size '2': must be a number"),
        ({"model_path": "m", "tp_size": True}, "tp_size True: must be a number"),
        ({"model_path": "m", "pp_size": 0}, "pp_size 0: must be at least 1"),
    ],
)
def test_arguments_that_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerArguments.from_mapping(values)


def test_rank_counts_pipeline_stages() -> None:
    assert [loader_rank(tp, pp, 4) for pp in range(2) for tp in range(4)] == list(range(8))
