"""Reads and validates the headers of safetensors files, which are not trusted.

A file is the length of its header (8 bytes, little-endian), the header (JSON), and the tensors' bytes without gaps.
"""

import contextlib
import json
import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Bits per element.
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8,
    "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6,
    "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# Dtypes of weights, and of tables of ids.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32}
_LONGEST_HEADER = 100_000_000  # the format's own limit
_DEEPEST = 64


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header. start and stop are bytes after the header."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, in its order.

    Raises ValueError for a file that is missing, or shorter or longer than its header says, and for a header that is
    not JSON, names a tensor twice, or whose offsets overlap, leave gaps or run past the end.
    """
    where, size = str(path), size_of_file(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _LONGEST_HEADER):
            problem = f"says that its header has {length} bytes" if len(prefix) == 8 else "has no header"
            raise ValueError(f"{where} {problem}, but the file has {size} bytes; expected a safetensors file")
        text = file.read(length)
    header = parse_json(where, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{where}: __metadata__ is {metadata!r:.100}; expected strings by name")
    tensors = {name: _tensor(where, path.name, name, entry) for name, entry in header.items()}
    _check_places(where, tensors, size - 8 - length)
    return tensors


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The file opened by safetensors, after its header has been read.

    Raises ValueError for files that safetensors' parser refuses and `read_header` accepts.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}; expected a file that safetensors reads") from None


def size_of_file(path: Path) -> int:
    """The size in bytes of a regular file; links are followed."""
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; expected a file") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no regular file; expected one")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file."""
    size_of_file(path)
    return parse_json(str(path), path.read_bytes())


def parse_json(where: str, text: bytes) -> dict[str, Any]:
    """Parses a JSON object. Raises ValueError for invalid JSON, deep nesting, repeated names, or another type."""
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            twice.extend([name] if name in found else [])
            found[name] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({type(error).__name__}: {error}); expected a JSON object") from None
    if not _is_shallow(value):
        raise ValueError(f"{where} nests lists and objects deeper than {_DEEPEST}; expected a JSON object without such")
    if twice:
        raise ValueError(f"{where} has {twice[0]!r} twice; expected every name once")
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}; expected a JSON object")
    return value


def _is_shallow(value: Any) -> bool:
    """Whether recursion over a value, as in its repr, stays far below Python's recursion limit."""
    level = [value]
    for _ in range(_DEEPEST):
        lists = [inner for inner in level if isinstance(inner, dict | list)]
        level = [inner for outer in lists for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return not any(isinstance(inner, dict | list) for inner in level)


def _tensor(where: str, file: str, name: str, entry: Any) -> TensorInfo:
    entry = entry if isinstance(entry, Mapping) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: {name} is {entry!r:.200}; expected dtype, shape and data_offsets")
    if dtype not in BITS:
        raise ValueError(f"{where}: {name} has dtype {dtype!r:.40}; expected one of {', '.join(BITS)}")
    bits, taken = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * taken:
        raise ValueError(f"{where}: {name} has {taken} bytes; expected {-(-bits // 8)} for {dtype} {list(shape)}")
    return TensorInfo(file, dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    """Whether a value is a list of at most 64 integers in [0, 2**63), so that their product is fast to compute."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_places(where: str, tensors: Mapping[str, TensorInfo], size: int) -> None:
    last = max(tensors, key=lambda name: tensors[name].stop, default=None)
    if last is not None and tensors[last].stop > size:
        raise ValueError(
            f"{where} is cut short: {last} ends at byte {tensors[last].stop} after the header; expected at most {size}"
        )
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            problem = "overlaps the tensor before it" if tensor.start < end else "leaves a gap"
            raise ValueError(
                f"{where}: {name} begins at byte {tensor.start} after the header and {problem}; expected byte {end}"
            )
        end = tensor.stop
    if end != size:
        raise ValueError(f"{where} has {size - end} bytes after its last tensor; expected none")
