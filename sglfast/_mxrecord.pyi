def split(request: bytes) -> tuple[bytes, bytes, int, bytes, int]:
    """Take the tensor descriptors out of a serialised PublishMetadataRequest.

    Returns (the request without descriptors, records and number of WorkerMetadata.tensors, records and number of
    WorkerMetadata.tensor_source.tensors). Records are the serialised form of a TensorSourceMetadata: each descriptor as field 1.
    Unknown fields stay where they are. Raises ValueError for what is no such message, with the reason.
    """

def retag(records: bytes, number: int) -> bytes:
    """Records of `split` as fields of another number, 1 to 15. Same size. Raises ValueError for damaged records."""
