"""Files that are on the disk when they are said to be, with the hash of what was meant to be in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Sealed:
    """A file's size and SHA-256."""

    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Sealed:
    """Write tensors that are on the CPU as safetensors, without a copy of them in memory; see `write`."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    buffers, end = [], 0
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().view(-1)
        buffers.append(flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b""))
        begin, end = end, end + flat.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write(path, [memoryview(len(text).to_bytes(8, "little") + text), *buffers])


def write(path: Path, buffers: Iterable[memoryview]) -> Sealed:
    """Write a new file that only its owner may read, flush it to the disk, and hold it against the buffers.

    The hash is of the buffers, not of the file; a thread computes it while the disk is busy.

    Raises:
        OSError: it cannot be written, or holds something else than was written.
    """
    digest, num_bytes, buffers = hashlib.sha256(), 0, list(buffers)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with ThreadPoolExecutor(max_workers=1) as pool, os.fdopen(descriptor, "wb", buffering=0) as file:
        for chunk in _chunks(buffers):
            hashed = pool.submit(digest.update, chunk)
            written = 0
            while written < len(chunk):  # one call may write less, and the next one then says why
                written += file.write(chunk[written:])
            num_bytes += len(chunk)
            hashed.result()
        os.fsync(file.fileno())
    _compare(path, buffers)
    return Sealed(num_bytes, digest.hexdigest())


def _compare(path: Path, buffers: list[memoryview]) -> None:
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # what is read now comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for chunk in _chunks(buffers):
            found = memoryview(bytearray(len(chunk)))
            filled = 0
            while filled < len(chunk) and (num_read := file.readinto(found[filled:])):
                filled += num_read
            if found != chunk:
                raise OSError(None, "holds something else than was written to it", str(path))


def _chunks(buffers: list[memoryview]) -> Iterable[memoryview]:
    for buffer in buffers:
        for start in range(0, len(buffer), CHUNK_BYTES):
            yield buffer[start : start + CHUNK_BYTES]


def write_json(path: Path, content: object) -> Sealed:
    """Write a value as JSON; see `write`."""
    return write(path, [memoryview(json.dumps(content, indent=1, allow_nan=False).encode())])


def seal_of(path: Path) -> Sealed:
    """Size and hash of a file as it is."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Sealed(os.fstat(file.fileno()).st_size, digest)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
