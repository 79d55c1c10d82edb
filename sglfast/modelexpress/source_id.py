"""mx_source_id: the digest by which instances with the same weights find each other.

Runs in: the metadata service; clients that want to know an id beforehand. Contract: bit for bit the id of the upstream server
    (spec/modelexpress.md 2.1), also for names that are not ASCII, where upstream's Python function gives another.
Formula: the first 16 hex digits of the SHA-256 of canonical JSON: sorted keys, no spaces, UTF-8 as it is, all text in lower case.
"""

import hashlib
import json
from typing import Literal

from sglfast.modelexpress.schema import p2p

Form = Literal["current", "april"]
FORMS: tuple[Form, ...] = ("current", "april")

_TEXTS = ("dtype", "model_name", "mx_version", "quantization")
_NUMBERS = ("backend_framework", "expert_parallel_size", "mx_source_type", "pipeline_parallel_size", "tensor_parallel_size")
_TEXTS_IF_SET = ("backend_framework_version", "compile_config_digest", "cuda_version", "gpu_arch", "torch_version", "triton_version")


def canonical_json(identity: p2p.SourceIdentity, *, form: Form = "current") -> str:
    """The text whose digest is the id.

    form: `current` is that of servers since 0.5.0; `april` that of 0.3.x (April 2026), which knew no revision and no fields of compiled
    artifacts. Of extra parameters whose keys differ in case only, the first in byte order wins.
    """
    value: dict[str, object] = {name: getattr(identity, name).lower() for name in _TEXTS}
    value.update({name: int(getattr(identity, name)) for name in _NUMBERS})
    if form == "current":
        value["revision"] = identity.revision.lower()
        value.update({name: text.lower() for name in _TEXTS_IF_SET if (text := getattr(identity, name))})
    extra: dict[str, str] = {}
    for key, text in sorted(identity.extra_parameters.items()):  # by code point, which is the byte order of UTF-8
        extra.setdefault(key.lower(), text.lower())
    value["extra_parameters"] = extra
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def source_id(identity: p2p.SourceIdentity, *, form: Form = "current") -> str:
    """16 lower-case hex digits; `form` as for `canonical_json`."""
    return hashlib.sha256(canonical_json(identity, form=form).encode()).hexdigest()[:16]
