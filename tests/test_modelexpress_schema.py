"""The schema of ModelExpress: the golden descriptors and sample messages, and how it lives beside the real client's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from sglfast.modelexpress import pool
from sglfast.modelexpress.schema import health, p2p

FOLDER = Path(__file__).parent / "golden" / "modelexpress"
VERSIONS = ["2026_04", "0.5.1", "0.7.0"]
SAMPLES = [
    (name, sample) for name in ("wire_2026_04", "wire_0.7.0") for sample in json.loads((FOLDER / f"{name}.json").read_text())["messages"]
]
SCALARS = {
    number: name.removeprefix("TYPE_").lower() for name, number in vars(FieldDescriptor).items() if name.startswith("TYPE_")
}  # fmt: skip


def golden(version: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"descriptor_{version}.json").read_text())


def type_of(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{type_of(key)},{type_of(value)}>"
    if field.message_type is not None:
        return field.message_type.name
    return field.enum_type.name if field.enum_type is not None else SCALARS[field.type]


def described(field: FieldDescriptor) -> dict[str, Any]:
    row: dict[str, Any] = {"number": field.number, "name": field.name, "type": type_of(field)}
    if field.is_repeated and not row["type"].startswith("map<"):
        row["repeated"] = True
    oneof = field.containing_oneof
    if oneof is not None and oneof.name == f"_{field.name}":
        row["optional"] = True
    elif oneof is not None:
        row["oneof"] = oneof.name
    if field.GetOptions().deprecated:
        row["deprecated"] = True
    return row


def fields(message: Descriptor) -> list[dict[str, Any]]:
    return sorted(map(described, message.fields), key=lambda row: row["number"])


def test_it_is_the_schema_of_0_7_0() -> None:
    wanted, file = golden("0.7.0"), p2p.DESCRIPTOR
    assert (file.package, file.name) == (wanted["package"], "p2p.proto")
    assert {name: fields(message) for name, message in file.message_types_by_name.items()} == {
        name: sorted(rows, key=lambda row: row["number"]) for name, rows in wanted["messages"].items()
    }
    assert {name: {value.name: value.number for value in enum.values} for name, enum in file.enum_types_by_name.items()} == wanted["enums"]
    services = {
        service.full_name: [
            {"method": method.name, "path": f"/{service.full_name}/{method.name}",
             "request": method.input_type.name, "response": method.output_type.name,
             "client_streaming": method.client_streaming, "server_streaming": method.server_streaming}
            for method in service.methods
        ]
        for service in file.services_by_name.values()
    }  # fmt: skip
    assert services == wanted["services"]


@pytest.mark.parametrize("version", VERSIONS)
def test_it_holds_every_older_schema(version: str) -> None:
    for name, rows in golden(version)["messages"].items():
        held = {row["number"]: row for row in fields(p2p.DESCRIPTOR.message_types_by_name[name])}
        for row in rows:
            assert held[row["number"]]["name"] == row["name"]
            assert held[row["number"]]["type"] == row["type"]
            assert held[row["number"]].get("repeated") == row.get("repeated")
    for name, values in golden(version)["enums"].items():
        ours = {value.name: value.number for value in p2p.DESCRIPTOR.enum_types_by_name[name].values}
        assert values.items() <= ours.items()


@pytest.mark.parametrize(("file", "sample"), SAMPLES, ids=[f"{file}-{sample['name']}" for file, sample in SAMPLES])
def test_sample_messages_decode_and_encode_to_the_same_bytes(file: str, sample: dict[str, Any]) -> None:
    kind = getattr(p2p, sample["message"])
    wire = bytes.fromhex(sample["hex"])
    message = kind.FromString(wire)
    assert json_format.MessageToDict(message, preserving_proto_field_name=True, descriptor_pool=pool.POOL) == sample["json"]
    assert message.SerializeToString(deterministic=True) == wire
    assert json_format.ParseDict(sample["json"], kind(), descriptor_pool=pool.POOL).SerializeToString(deterministic=True) == wire


def test_health_answers_have_the_known_numbers() -> None:
    answer = health.HealthResponse(version="v", status="ok", uptime=300)
    assert answer.SerializeToString() == b"\x0a\x01v\x12\x02ok\x18\xac\x02"
    assert health.HealthRequest().SerializeToString() == b""
    assert "model_express.health.HealthService" in {service.full_name for service in health.DESCRIPTOR.services_by_name.values()}


def test_another_definition_of_the_same_names_lives_beside_ours() -> None:
    """As when the package `modelexpress` is imported: other contents, same file and message names, in protobuf's default pool."""
    file = descriptor_pb2.FileDescriptorProto(name="p2p.proto", package="model_express.p2p", syntax="proto3")
    file.message_type.add(name="SourceIdentity")
    code = (
        "import sys\nfrom google.protobuf import descriptor_pool\n"
        f"first = lambda: descriptor_pool.Default().AddSerializedFile({file.SerializeToString()!r})\n"
        "if sys.argv[1] == 'before': first()\n"
        "from sglfast.modelexpress.schema import p2p\n"
        "if sys.argv[1] == 'after': first()\n"
        "print(p2p.SourceIdentity(model_name='m').SerializeToString())"
    )
    for order in ("before", "after"):
        done = subprocess.run([sys.executable, "-W", "error", "-c", code, order], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, repr(b"\x1a\x01m") + "\n", "")
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindFileByName("p2p.proto")


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("grpc", "pip install 'sglfast[modelexpress]'"),
        ("google.protobuf", "pip install 'sglfast[modelexpress]'"),
        ("sglfast.modelexpress.p2p_pb2", "make build"),
    ],
)
def test_what_is_missing_is_said(missing: str, text: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nimport sglfast.modelexpress.schema"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert text in done.stderr.splitlines()[-1]
