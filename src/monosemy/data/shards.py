"""Describe, find and check the files of kept activations: on a disk, or at any URL that fsspec opens. Nothing
here imports torch.

    CACHE/manifest.json                      what is in it, with the sha256 of every shard; written last
    CACHE/SITE/shard-000000.safetensors      one tensor "activations" [R, D], rows in the order of training
    CACHE/writing.json                       while it is written: the shards that are whole, where to go on
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fsspec.core import url_to_fs

from monosemy.errors import TryAgain, invalid
from monosemy.lm.site_groups import AnySite, parse_site, parts
from monosemy.system.files import path_of, write_bytes
from monosemy.system.http import first_line, retry

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT, VERSION = "monosemy activations", 1
MANIFEST, WRITING, TENSOR = "manifest.json", "writing.json", "activations"
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
"""Precisions of rows: by what safetensors calls them, and their bytes."""
PIECE = 1 << 24  # bytes of a request, several of which run at a time; on a disk, bytes read at once
MOST = 1 << 28  # bytes of a manifest
HEADER = 1 << 20  # bytes of a shard's description

Buffer = np.ndarray[Any, np.dtype[np.uint8]]


class ActivationsUnavailable(TryAgain):
    """Kept activations cannot be read or written now. What was done is kept."""


class Damaged(ValueError):
    """A file of kept activations is not as it was written."""


@dataclass(frozen=True)
class Shard:
    """A file's size and digest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SiteRows:
    """The rows of a site. Factors and limits are as `ActivationStream` measured them."""

    widths: tuple[int, ...]  # of the parts of a row
    norm_factor: tuple[float, ...]
    norm_limit: tuple[float, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Block:
    """What was counted up to the end of the block that begins at a row."""

    row: int
    counts: dict[str, int]
    text_counts: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a cache holds. Every site has `rows` rows, in the same order of batches."""

    model: dict[str, Any]  # name, revision, dtype, and the same of the other model
    config: dict[str, Any]  # the settings that rows depend on
    dtype: str
    rows: int
    rows_per_shard: int
    sites: dict[AnySite, SiteRows]
    blocks: tuple[Block, ...]
    damage: tuple[str, ...]
    digest: str = ""
    """The sha256 of its file."""

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Read a manifest. Raises ValueError for anything else than one that was written here."""
        try:
            made = cls._of(json.loads(data), hashlib.sha256(data).hexdigest())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            allowed = f"activations that `monosemy cache` wrote (version {VERSION})"
            remedy = f"its {MANIFEST} cannot be read ({first_line(error)})"
            raise invalid("activations", where, allowed, remedy) from error
        return made

    @classmethod
    def _of(cls, data: Any, digest: str) -> Manifest:
        _hold(data["format"] == FORMAT and data["version"] == VERSION, f"version {data['version']}")
        _hold(data.pop("sha256") == _digest(data), "it is not as it was written")
        sites = {parse_site(name): _site_rows(of) for name, of in data["sites"].items()}
        blocks = tuple(Block(b["row"], dict(b["counts"]), dict(b["text_counts"])) for b in data["blocks"])
        made = cls(
            dict(data["model"]),
            dict(data["config"]),
            data["dtype"],
            data["rows"],
            data["rows_per_shard"],
            sites,
            blocks,
            tuple(map(str, data["damage"])),
            digest,
        )
        _hold(isinstance(made.dtype, str) and made.dtype in DTYPES, f"dtype {made.dtype!r}")
        _hold(_whole(made.rows) and _whole(made.rows_per_shard), "no whole numbers of rows")
        _hold(bool(sites) and all(_whole(b.row, 0) for b in blocks), "no sites, or blocks without a row")
        for site, of in sites.items():
            per_part = {len(of.widths), len(of.norm_factor)}
            _hold(per_part == {len(parts(site))} and len(of.shards) == made.shards, f"{site} does not fit")
        return made

    def dumps(self) -> bytes:
        """Return it as JSON, with its own digest."""
        sites = {
            str(site): {
                "shape": [self.rows, sum(of.widths)],
                "widths": of.widths,
                "norm_factor": of.norm_factor,
                "norm_limit": of.norm_limit,
                "shards": [vars(shard) for shard in of.shards],
            }
            for site, of in self.sites.items()
        }
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "config": self.config,
            "dtype": self.dtype,
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "sites": sites,
            "blocks": [vars(block) for block in self.blocks],
            "damage": self.damage,
        }
        data["sha256"] = _digest(json.loads(json.dumps(data)))
        return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()

    @property
    def shards(self) -> int:
        """How many shards a site has."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def bytes(self) -> int:
        """The bytes of all shards."""
        return sum(shard.bytes for of in self.sites.values() for shard in of.shards)


def _digest(data: dict[str, Any]) -> str:
    """Return the sha256 of what a manifest says, however it is spaced."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _site_rows(of: Mapping[str, Any]) -> SiteRows:
    shards = tuple(Shard(shard["bytes"], shard["sha256"]) for shard in of["shards"])
    known = all(_whole(shard.bytes) and isinstance(shard.sha256, str) for shard in shards)
    _hold(known, "a shard without size or digest")
    _hold(all(_whole(width) for width in of["widths"]), "widths that are no whole numbers")
    factors, limits = (tuple(map(float, of[key])) for key in ("norm_factor", "norm_limit"))
    return SiteRows(tuple(of["widths"]), factors, limits, shards)


def _whole(n: object, least: int = 1) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and least <= n < 2**53


def _hold(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


def shard_name(site: AnySite, number: int) -> str:
    """Return a shard's place in its cache."""
    return f"{site.folder}/shard-{number:06d}.safetensors"


class Store:
    """A folder of files: on a disk, or at a URL of fsspec's, such as s3://BUCKET/PREFIX.

    Whatever fails is tried again after each of `pauses`, then raises `ActivationsUnavailable`. What waiting
    does not mend (no such file, no permission, bytes that are others) raises ValueError at once.
    """

    def __init__(self, url: str, field: str, pauses: Sequence[float]) -> None:
        """Raises ValueError for a URL that cannot be opened; `field` is the setting that names it."""
        self.url, self.field, self.pauses = url, field, tuple(pauses)
        self.local: Path | None = None
        self._fs: Any = None
        self._root = ""
        if "://" not in url or url.startswith("file://"):
            self.local = path_of(field, url.removeprefix("file://"))
        else:
            self._fs, self._root = _remote(url, field)

    def __str__(self) -> str:
        return self.url

    def place(self, name: str) -> str:
        """Return a file's path or URL."""
        return f"{self.url.rstrip('/')}/{name}"

    def read(self, name: str, wanted: Shard | None = None) -> Buffer:
        """Return a file's bytes, which are those that are wanted.

        Bytes that came over a network are read again before they are refused.
        """
        found: set[str] = set()

        def attempt() -> Buffer:
            data, digest = self._get(name, wanted)
            if wanted is not None and digest != wanted.sha256:
                if self.local is not None or digest in found:
                    raise self._damaged(name, f"its sha256 is {digest}, not {wanted.sha256}")
                found.add(digest)
                raise OSError(f"bytes whose sha256 is {digest}, not {wanted.sha256}")
            return data

        return self._retried("read", name, attempt)

    def find(self, name: str) -> bytes | None:
        """Return a small file's bytes; None where there is no such file."""
        try:
            return self.read(name).tobytes()
        except _Missing:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file; a reader sees none or all of it."""
        if self.local is not None:
            write_bytes(self.local / name, data)
            return

        def attempt() -> None:
            try:
                self._fs.pipe_file(self._path(name), data)
            except FileNotFoundError:  # where folders are made before their files
                self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(self._path(name), data)

        self._retried("written", name, attempt)

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
        elif self.find(name) is not None:
            self._retried("removed", name, lambda: self._fs.rm_file(self._path(name)))

    def size(self, name: str) -> int:
        """Return a file's size. Raises ValueError where there is none."""

        def attempt() -> int:
            if self.local is not None:
                return (self.local / name).stat().st_size
            self._fs.invalidate_cache(self._path(name).rpartition("/")[0])
            return int(self._fs.info(self._path(name))["size"])

        return self._retried("read", name, attempt)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _get(self, name: str, wanted: Shard | None) -> tuple[Buffer, str]:
        """Return a file's bytes and their sha256."""
        if wanted is not None and (size := self.size(name)) != wanted.bytes:
            raise self._damaged(name, f"it has {size:,} bytes, not {wanted.bytes:,}")
        if self.local is not None:
            return _from_disk(self.local / name)
        path = self._path(name)
        if wanted is None:
            pieces = [self._fs.cat_file(path)]
        else:
            starts = list(range(0, wanted.bytes, PIECE))
            ends = [min(start + PIECE, wanted.bytes) for start in starts]
            pieces = self._fs.cat_ranges([path] * len(starts), starts, ends, on_error="raise")
        data = np.empty(sum(map(len, pieces)), dtype=np.uint8)
        if wanted is not None and len(data) != wanted.bytes:
            raise OSError(f"{len(data):,} bytes came of {wanted.bytes:,}")
        end = 0
        for piece in pieces:
            data[end : end + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            end += len(piece)
        return data, hashlib.sha256(data.data).hexdigest()

    def _damaged(self, name: str, why: str) -> ValueError:
        allowed = "shards as they were written"
        remedy = f"{why}: write it again, with `monosemy cache` into a new folder, or copy it once more"
        return Damaged(str(invalid(self.field, self.place(name), allowed, remedy)))

    def _retried(self, what: str, name: str, attempt: Callable[[], T]) -> T:
        """Call until it succeeds. Raises as the class says."""

        def on_error(error: Exception, pause: float | None) -> float:
            if isinstance(error, ValueError | TryAgain | NotImplementedError):
                raise error
            place, why = self.place(name), first_line(error)
            if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                raise _Missing(str(invalid(self.field, place, "a file", "it is not there"))) from error
            if isinstance(error, PermissionError):
                remedy = f"check permissions and credentials ({why})"
                raise invalid(self.field, place, f"a file that can be {what}", remedy) from error
            if pause is None:
                message = f"{place} could not be {what} ({why}) in {len(self.pauses) + 1} attempts"
                raise ActivationsUnavailable(f"{message}. Check the network or the disk.") from error
            log.warning("%s could not be %s (%s): trying again in %g s", place, what, why, pause)
            return pause

        return retry(attempt, self.pauses, on_error)


class _Missing(Damaged):
    """There is no such file."""


def _remote(url: str, field: str) -> tuple[Any, str]:
    """Return the file system of a URL, and its path there."""
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):  # one attempt of its own for each of ours, and no endless wait
        options = {"config_kwargs": {"retries": {"total_max_attempts": 1}, "read_timeout": 60}}
    try:
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        package = "pip install 'monosemy[s3]'" if options else f"install what fsspec asks for ({error})"
        raise invalid(field, url, "a URL whose package is installed", package) from error
    except (ValueError, OSError) as error:
        allowed = "a folder, or a URL of a kind that fsspec knows, such as s3://BUCKET/PREFIX"
        raise invalid(field, url, allowed, f"correct it ({first_line(error)})") from error
    if hasattr(type(fs), "retries"):
        fs.retries = 1
    return fs, path.rstrip("/")


def _from_disk(path: Path) -> tuple[Buffer, str]:
    """Return a file's bytes and their sha256. The system reads ahead while they are hashed."""
    digest, end = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        data = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
        while end < len(data) and (n := file.readinto(data[end : end + PIECE].data)):
            digest.update(data[end : end + n].data)
            end += n
    return data[:end], digest.hexdigest()


def tensor_in(data: Buffer, shape: tuple[int, int], dtype: str) -> Buffer:
    """Return the bytes of a shard's tensor, which has this shape and precision; no copy.

    A shard is a safetensors file: the length of a header, the header as JSON, and the bytes. Raises
    ValueError that says what it holds instead.
    """
    length = int.from_bytes(data[:8].tobytes(), "little")
    inside = len(data) >= 8 and length <= min(HEADER, len(data) - 8) and length % 8 == 0
    _hold(inside, "it is no safetensors file")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        of = header[TENSOR]
        found = (tuple(of["shape"]), of["dtype"], tuple(of["data_offsets"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it has no tensor {TENSOR!r}") from error
    called, size = DTYPES[dtype]
    bytes_ = shape[0] * shape[1] * size
    wanted = (shape, called, (0, bytes_))
    _hold(found == wanted, f"its tensor has shape, type and place {found}, not {wanted}")
    _hold(len(data) == 8 + length + bytes_, "its bytes are not those of its tensor")
    return data[8 + length :]
