"""Message classes from a compiled schema, in a descriptor pool of our own.

Runs in: every process that speaks ModelExpress. Contract: `define` is called by the built modules `p2p_pb2` and `health_pb2`, once each.
Why: the package `modelexpress` puts a file of the same messages into protobuf's default pool, and a process in which both are imported
    (an engine with its loader and our client) must not fail over two definitions of one name. A pool of our own also keeps the built
    modules free of protoc's check that the runtime is not older than the compiler: any protobuf of the extra's range loads them.
"""

from typing import Any

try:
    import grpc as _grpc  # noqa: F401  (named here so that what is missing is told at the first import, not at the first call)
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.internal import enum_type_wrapper
except ImportError as error:
    raise ImportError(f"ModelExpress needs grpcio and protobuf ({error}); install them: pip install 'sglfast[modelexpress]'") from error

POOL = descriptor_pool.DescriptorPool()


def define(serialized_file: bytes, module: dict[str, Any]) -> None:
    """Put a schema's messages, enums and enum values into a module's globals.

    serialized_file: a FileDescriptorProto without imports. Raises TypeError when its names are in the pool with other contents.
    """
    file = descriptor_pb2.FileDescriptorProto.FromString(serialized_file)
    POOL.AddSerializedFile(serialized_file)
    described = POOL.FindFileByName(file.name)
    module["DESCRIPTOR"] = described
    for name, message in described.message_types_by_name.items():
        module[name] = message_factory.GetMessageClass(message)
    for name, enum in described.enum_types_by_name.items():
        module[name] = enum_type_wrapper.EnumTypeWrapper(enum)
        module.update({value.name: value.number for value in enum.values})
