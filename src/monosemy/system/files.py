"""Files that are written whole or not at all, and a full disk in words."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from monosemy.errors import TryAgain, invalid

log = logging.getLogger(__name__)

LOCK = ".lock"  # the file in a folder that says whose it is
FULL = 1 << 16  # bytes free, below which a library that failed without saying why has met a full disk


def cache_folder() -> Path:
    """Return where what is built once is kept: `MONOSEMY_CACHE`, else `monosemy` in the user's cache
    folder."""
    if chosen := os.environ.get("MONOSEMY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "monosemy"


class DiskFull(TryAgain):
    """There is no room for a file. What was there before is whole."""


@contextmanager
def check_disk_space(path: Path, needed: int) -> Iterator[None]:
    """Write something at `path` that takes `needed` bytes.

    Raises DiskFull with both, before or after it was tried, and OSError.
    """
    folder = next(p for p in path.absolute().parents if p.exists())
    if shutil.disk_usage(folder).free < needed:
        raise _full(path, needed, folder)
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path, needed, folder) from error
        raise
    except (RuntimeError, SafetensorError) as error:  # as torch.save and save_file say it
        if shutil.disk_usage(folder).free < FULL:
            raise _full(path, needed, folder) from error
        raise


def _full(path: Path, needed: int, folder: Path) -> DiskFull:
    free = shutil.disk_usage(folder).free
    return DiskFull(f"{path} needs {needed:,} bytes and its disk has {free:,} free; make room")


@contextmanager
def atomic_path(path: Path, needed: int) -> Iterator[Path]:
    """Yield a path to write a file of about `needed` bytes at, which becomes `path` once it is whole and on
    the disk. Raises as `check_disk_space`."""
    part = path.with_name(f".{path.name}.part")
    try:
        with check_disk_space(path, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            sync(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; a reader sees the old one or the new one. Raises DiskFull and OSError."""
    with atomic_path(path, len(data)) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a file's text as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """Return what a JSON file holds; where there is none, `default` if that is given.

    Raises FileNotFoundError, and ValueError for what is no JSON.
    """
    if default is not None and not path.is_file():
        return default
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file; none if there is no such file.

    A last line that a killed run left half-written is dropped.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:-1]]
    # a writer that died inside its last line; every line before it is whole
    with suppress(json.JSONDecodeError):
        rows += [json.loads(line) for line in lines[-1:]]
    return rows


def check_new(folder: Path) -> None:
    """Check that nothing is in a folder's way. Raises ValueError where it is there and not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise invalid("target", str(folder), "a new or empty folder", "name another; nothing is overwritten")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write in, which becomes `folder` once all is in it; nothing is left otherwise.

    Raises ValueError where that is there and not empty, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    check_new(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    except OSError as error:
        remedy = f"check permissions and space ({error.strerror or error})"
        raise invalid("target", str(folder), "a folder that can be written", remedy) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def append(path: Path, text: str) -> None:
    """Add text to a file's end, all of it or none. Raises DiskFull and OSError."""
    data = memoryview(text.encode())
    with check_disk_space(path, len(data)), open(path, "ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


@contextmanager
def exclusive_lock(folder: Path, field: str) -> Iterator[None]:
    """Hold an exclusive lock on a folder, which is created if missing. The system releases it when the
    process dies.

    Raises ValueError that names `field` where another process holds it. On a file system without locks a
    warning takes its place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        allowed = "a folder that no other process trains in"
        raise invalid(field, str(folder), allowed, "wait for that one to end, or name another") from error
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be kept from other processes (%s)", folder, error)
    try:
        yield
    finally:
        if os.name != "nt":  # where an open file cannot be removed, the lock's release does it
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # if nothing came of it


def sync(path: Path) -> None:
    """fsync a file or a folder; on Windows, where folders cannot be opened, a file alone."""
    if os.name == "nt" and path.is_dir():
        return
    # Windows flushes what it may write to
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def path_of(field: str, value: str) -> Path:
    """Parse a path as a user writes it, with ~ expanded. Raises ValueError for what no file can be called."""
    try:
        value.encode()
        path = Path(value).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path  # whether it has to exist is for others to say
    # too long, a loop of links, NUL, no UTF-8, a user's home that is not known
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        raise invalid(field, value, "a path", f"name another ({error})") from error
    return path
