"""The limits of a task's `metadata`."""

from collections.abc import Mapping

from service.errors import ApiError

METADATA_PAIRS, METADATA_BYTES = 16, 2048


def check_metadata(metadata: object) -> None:
    """Up to 16 pairs of text, 2 KiB in all. Raises ApiError 400."""
    if metadata is None:
        return
    texts = isinstance(metadata, Mapping) and all(isinstance(x, str) for x in metadata.values())
    if not isinstance(metadata, Mapping) or not texts:
        raise _invalid("metadata must be an object of texts")
    if len(metadata) > METADATA_PAIRS:
        raise _invalid(f"metadata has at most {METADATA_PAIRS} pairs, not {len(metadata)}")
    size = sum(len(name.encode()) + len(value.encode()) for name, value in metadata.items())
    if size > METADATA_BYTES:
        raise _invalid(f"metadata has at most {METADATA_BYTES} bytes, not {size}")


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_parameter", message, param="metadata")
