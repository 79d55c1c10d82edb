"""From the arguments of an SGLang server to the SourceIdentity that its seeds and targets must share.

Runs in: whatever process publishes or looks for weights. Contract: an identity says which weights fit which; two instances match when
    their identities are equal but for letter case (source_id.py has the digest). SGLang has two forms of it, which never match each other:

    | form | SGLang | mx_version | dtype | quantization | worker_rank |
    |---|---|---|---|---|---|
    | server arguments (PR #21222) | spring 2026, `--remote-instance-weight-loader-backend modelexpress` | none | as written on the command line, `auto` too | as written | tp_rank |
    | package loader (modelexpress 0.4 to 0.7) | since v0.5.13.post1 | version of the package | of the loaded model | of the loaded model | pp_rank * tp_size + tp_rank |

    So `--dtype auto` beside `--dtype bfloat16`, a folder beside a hub id, or two package versions find nothing: that is what an
    operator sees as "no READY source". Source of both: spec modelexpress.md 3.1 and 3.2.
"""  # noqa: E501 - a table

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from sglfast.errors import ConfigError
from sglfast.modelexpress.schema import p2p


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerArguments:
    """What of an SGLang server's arguments says which weights it has; names and defaults are SGLang's.

    tp_size, pp_size, ep_size: tensor, pipeline and expert parallelism, in ranks. dtype, quantization: as on the command line.
    """

    model_path: str
    tp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    dtype: str = "auto"
    quantization: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.model_path:
            raise ConfigError("model_path is empty: weights without a name cannot be published or found")
        for name in ("tp_size", "pp_size", "ep_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Self:
        """Take them from `vars(server_args)` or a worker's /server_info; other keys are ignored, missing ones have their defaults.

        Raises ConfigError for a value of the wrong type, or without model_path.
        """
        known: dict[str, str | int] = {}
        for name, kind in (
            ("model_path", str), ("tp_size", int), ("pp_size", int), ("ep_size", int), ("dtype", str), ("quantization", str),
            ("revision", str),
        ):  # fmt: skip
            value = values.get(name)
            if value is None:
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(f"{name} {value!r}: must be {'a number' if kind is int else 'text'}")
            known[name] = value
        if "model_path" not in known:
            raise ConfigError("model_path is missing: weights without a name cannot be published or found")
        return cls(**known)  # type: ignore[arg-type]  # the loop pairs names with types


def arguments_identity(arguments: ServerArguments, model_name: str | None = None) -> p2p.SourceIdentity:
    """The identity of SGLang PR #21222. model_name: of its `--modelexpress-config`, else the model path."""
    return p2p.SourceIdentity(
        model_name=model_name or arguments.model_path,
        backend_framework=p2p.BACKEND_FRAMEWORK_SGLANG,
        tensor_parallel_size=arguments.tp_size,
        pipeline_parallel_size=arguments.pp_size,
        expert_parallel_size=arguments.ep_size,
        dtype=arguments.dtype,
        quantization=arguments.quantization or "",
    )


def loader_identity(
    arguments: ServerArguments, *, mx_version: str, dtype: str, quantization: str | None = None, revision: str | None = None
) -> p2p.SourceIdentity:
    """The identity of the loader in the modelexpress package.

    mx_version: of that package; dtype: of the loaded model, with or without `torch.`; quantization: what was found in the checkpoint,
    None = the argument; revision: None = the argument. Raises ConfigError for the dtype `auto`, which no loaded model has.
    """
    resolved = dtype.removeprefix("torch.")
    if resolved in ("", "auto"):
        raise ConfigError(f"dtype {dtype!r}: this form of the identity takes the loaded model's, as bfloat16")
    return p2p.SourceIdentity(
        mx_version=mx_version,
        mx_source_type=p2p.MX_SOURCE_TYPE_WEIGHTS,
        model_name=arguments.model_path,
        backend_framework=p2p.BACKEND_FRAMEWORK_SGLANG,
        tensor_parallel_size=arguments.tp_size,
        pipeline_parallel_size=arguments.pp_size,
        expert_parallel_size=arguments.ep_size,
        dtype=resolved,
        quantization=(arguments.quantization if quantization is None else quantization) or "",
        revision=(arguments.revision if revision is None else revision) or "",
    )


def loader_rank(tp_rank: int, pp_rank: int, tp_size: int) -> int:
    """worker_rank of the package loader; data-parallel ranks do not count. PR #21222 has plain tp_rank: not safe with pp_size > 1."""
    return pp_rank * tp_size + tp_rank
