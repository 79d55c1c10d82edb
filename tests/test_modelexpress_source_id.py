"""mx_source_id: the golden vectors of both forms, those where upstream's client and server disagree, and the collision rule."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from sglfast.modelexpress.schema import p2p
from sglfast.modelexpress.source_id import canonical_json, source_id

FOLDER = Path(__file__).parent / "golden" / "modelexpress"


def vectors(name: str) -> list[Any]:
    return [pytest.param(vector, id=vector["name"]) for vector in json.loads((FOLDER / f"{name}.json").read_text())["vectors"]]


def identity_of(vector: dict[str, Any]) -> p2p.SourceIdentity:
    return p2p.SourceIdentity(**vector["identity"])


@pytest.mark.parametrize("vector", vectors("source_id_current"))
def test_current_form(vector: dict[str, Any]) -> None:
    identity = identity_of(vector)
    assert canonical_json(identity) == vector["canonical_json"]
    assert source_id(identity) == vector["mx_source_id"]
    wire = p2p.SourceIdentity.FromString(bytes.fromhex(vector["serialized_identity_hex"]))
    assert source_id(wire, form="current") == vector["mx_source_id"]


@pytest.mark.parametrize("vector", vectors("source_id_2026_04"))
def test_april_form(vector: dict[str, Any]) -> None:
    identity = identity_of(vector)
    assert canonical_json(identity, form="april") == vector["canonical_json"]
    assert source_id(identity, form="april") == vector["mx_source_id"]
    identity.revision, identity.gpu_arch = "main", "sm90"
    assert source_id(identity, form="april") == vector["mx_source_id"], "0.3.x knows no revision and no artifact fields"


@pytest.mark.parametrize("vector", vectors("source_id_unicode_divergence"))
def test_names_that_are_not_ascii_get_the_servers_id(vector: dict[str, Any]) -> None:
    identity = identity_of(vector)
    assert canonical_json(identity) == vector["server_canonical"]
    assert source_id(identity) == vector["server_mx_source_id"]


def test_of_colliding_extra_keys_the_first_in_byte_order_wins() -> None:
    extra = {"foo": "LOW", "Foo": "Up", "ü": "1", "zz": "2"}
    text = canonical_json(p2p.SourceIdentity(model_name="m", extra_parameters=extra))
    assert '"extra_parameters":{"foo":"up","zz":"2","ü":"1"}' in text


def test_the_two_forms_differ_and_are_digests_of_their_text() -> None:
    identity = p2p.SourceIdentity(model_name="m")
    assert source_id(identity) != source_id(identity, form="april")
    assert source_id(identity) == hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
