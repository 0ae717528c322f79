"""Files that strangers wrote, read without harm.

Nothing in them is executed, no name in them is used as a path, and what is allocated is bounded by the file
itself: compressed or overlapping members of an archive, views larger than their storage and configurations of
endless lists are refused before they are opened.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import tokenize
import zipfile
from collections.abc import Collection
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from monosemy.errors import invalid

CONFIG_BYTES = 8 << 20
CONFIG_ENTRIES = 20_000  # brackets and commas
HEADER_BYTES = 1 << 20  # of a safetensors file, and of an archive's list of members
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises ValueError where it holds anything else, or more than a configuration does.
    """
    try:
        with _regular(path) as file:
            data = file.read(CONFIG_BYTES + 1)
        if len(data) > CONFIG_BYTES or sum(map(data.count, (b"[", b"{", b","))) > CONFIG_ENTRIES:
            raise ValueError("larger than any configuration")
        value = json.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise invalid(
            path.name, str(path), f"a {path.name} with a JSON object", f"name an SAE's own folder ({error})"
        ) from error
    if not isinstance(value, dict):
        raise invalid(path.name, str(path), "a JSON object", "copy it again")
    return value


def sha256(path: Path) -> str:
    """Return the digest of a file that is known to be there."""
    with _regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, mapped rather than read.

    Raises ValueError for a damaged or strange one.
    """
    try:
        with _regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            strange = {opened.get_slice(name).get_dtype() for name in names} - DTYPES
            if strange:
                raise ValueError(f"tensors of type {', '.join(sorted(strange))}")
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise invalid(path.name, str(path), "a whole safetensors file", f"copy it again ({error})") from error


def npz(path: Path, *spellings: Collection[str]) -> dict[str, Tensor]:
    """Read the arrays of numbers of an uncompressed .npz, as float32.

    Their names must be those of one of the `spellings`. Raises ValueError where there are fewer, more or
    others.
    """
    try:
        with _regular(path) as file, _plain_archive(file) as archive:
            inside = sorted(name.removesuffix(".npy") for name in archive.namelist())
            if inside not in map(sorted, spellings):
                raise ValueError(f"it has {', '.join(inside)[:80]}")
            return {name: _npy(archive.read(f"{name}.npy")) for name in inside}
    except _DAMAGE as error:
        names = " or ".join(map(", ".join, spellings))
        allowed = f"an uncompressed .npz with the arrays {names}, and no others"
        raise invalid(
            path.name, str(path), allowed, f"copy it again ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors in what torch.save wrote, mapped rather than read.

    Raises ValueError for an archive with anything else in it.
    """
    refusal = (path.name, str(path), "a state dict of tensors and nothing else", "check where it comes from")
    try:
        with _regular(path) as file, _plain_archive(file):
            pass
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    # whatever a damaged or hostile pickle makes of the unpickler, which has no one error for it
    except Exception as error:
        raise invalid(*refusal) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise invalid(*refusal)
    for name, tensor in state.items():
        if not _is_whole(tensor):
            found = type(tensor).__name__
            raise invalid(
                f"{path.name}: {name[:80]!r}",
                found,
                "a whole tensor, and nothing else beside tensors",
                refusal[-1],
            )
    return state


def _is_whole(value: Any) -> bool:
    """Whether this is a plain tensor whose numbers are all there."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    if not plain or value.is_quantized or value.is_meta:
        return False
    return bool(value.untyped_storage().nbytes() >= value.numel() * value.element_size())


_DAMAGE = (
    tokenize.TokenError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    struct.error,
)


def _regular(path: Path) -> BufferedReader:
    """Return the file, opened; not a pipe or a device, which might never end."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.name}")
    return open(path, "rb")


def _plain_archive(file: BufferedReader) -> zipfile.ZipFile:
    """Return a zip whose members are stored as they are and lie apart, so that what is read from it is no
    larger than the file."""
    size = file.seek(0, 2)
    file.seek(max(size - 98, 0))
    # the end record of 22 bytes, before it the locator of 20 and the long end record of 56 where there are
    # any
    tail = file.read()
    if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise ValueError("no end of a zip where one must be")
    directory = int.from_bytes(tail[-10:-6], "little")
    if tail[-42:-38] == b"PK\6\7":
        if len(tail) < 98 or tail[:4] != b"PK\6\6" or int.from_bytes(tail[-34:-26], "little") != size - 98:
            raise ValueError("a second end of the zip")
        directory = int.from_bytes(tail[40:48], "little")
    if directory > HEADER_BYTES:
        raise ValueError("more members than tensors")
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if any(
        m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size or m.flag_bits & 1
        for m in members
    ):
        raise ValueError("compressed members")
    if any(m.filename.endswith(".pkl") and m.file_size > HEADER_BYTES for m in members):
        raise ValueError("a pickle larger than names of tensors make it")
    if sum(m.file_size for m in members) > size or len({m.filename for m in members}) < len(members):
        raise ValueError("overlapping members")
    return archive


def _npy(data: bytes) -> Tensor:
    """Return the array in the bytes of an .npy file, as float32.

    numpy reads its header, a literal of Python; what that says is held to the bytes that are there before
    anything is allocated.
    """
    file = io.BytesIO(data)
    readers = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}
    version = format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of .npy")
    shape, fortran, dtype = readers[version](file, max_header_size=4096)
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError("not an array of floating-point numbers")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(data) - file.tell():
        raise ValueError("not as many numbers as it says")
    array = np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(np.float32))
