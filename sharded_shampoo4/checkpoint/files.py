"""The files of a portable checkpoint: a manifest, which is replaced in one go, and a folder that DCP writes.

The manifest is replaced when everything else is on disk, and names the folder that it belongs to. So a save that is cut
off at whatever moment leaves the checkpoint before it as it was. It also has the checksums of all files, which are
compared before anything is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..comm.ranks import Ranks
from ..report import warn
from .vectors import Interval

FORMAT_VERSION = 2  # 1: the code book "normal" had other levels
MANIFEST = "manifest.json"
_TOKEN = "seen-by-all-ranks"
_PATIENCE = (0.1, 1.0, 4.0)  # seconds to wait for it
_STARTED = time.monotonic()


# -- writing -----------------------------------------------------------------------------------------------------------


def new_data_folder(directory: str | os.PathLike[str], ranks: Ranks) -> Path:
    """Make a new folder for DCP's files in ``directory``, the same for all ranks; collective.

    Raises:
        OSError: it cannot be made, or not all ranks see the one of rank 0.
        ValueError: ranks that train something else save to ``directory`` as well.
    """
    of_some = "" if ranks.first is None else f"rank{ranks.first}-"
    name: str = ranks.gather(f"data-{of_some}{uuid.uuid4().hex}")[0]
    with ranks.together():
        data = Path(directory) / name
    with _discarding(data):
        with ranks.together():
            data.mkdir(parents=True, exist_ok=True)
            if of_some:
                _refuse_shared(data, of_some)
            if ranks.rank == 0:
                (data / _TOKEN).touch()
        _refuse_separate(data, ranks)
    return data


@contextlib.contextmanager
def _discarding(data: Path) -> Iterator[None]:
    """Remove the folder of a save that raises an error in here, unless a manifest names it already."""
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # what cannot be read may name it
            path = data.parent / MANIFEST
            if not path.exists() or json.loads(path.read_text())["manifest"]["data"] != data.name:
                shutil.rmtree(data, ignore_errors=True)
        raise


def _refuse_separate(data: Path, ranks: Ranks) -> None:
    """Raise OSError on every rank if some do not see what rank 0 has written; collective."""
    token = data / _TOKEN
    for seconds in _PATIENCE:  # network file systems may need a moment
        time.sleep(0 if os.path.exists(token) else seconds)  # Path.exists() raises some errors of such systems
    blind = [rank for rank, sees in enumerate(ranks.gather(os.path.exists(token))) if not sees]
    with ranks.together():
        if blind:
            raise OSError(
                f"rank(s) {', '.join(map(str, blind))} do not see {data.parent} of rank 0: save to storage that all "
                "nodes share"
            )
        if ranks.rank == 0:
            token.unlink()


def _refuse_shared(data: Path, of_some: str) -> None:
    """Raise ValueError if, since this process was started, ranks that train something else have saved there as well."""
    started = data.stat().st_mtime - (time.monotonic() - _STARTED)
    for other in data.parent.glob("data-rank*-*"):
        if not other.name.startswith(f"data-{of_some}") and other.stat().st_mtime > started:
            ranks = other.name.split("-")[1].replace("rank", "rank ")
            raise ValueError(
                f"{data.parent} has a checkpoint that {ranks} writes in this run, with an optimizer of other ranks "
                "(process_group=, or a mesh): give each of them a directory of its own"
            )


def write(data: Path, manifest: Mapping[str, Any], tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Write the files, then the manifest that makes them count, and remove what was there before; collective.

    Args:
        data: as :func:`new_data_folder` has made it.
        manifest: what it says of the contents.
        tensors: this rank's, by their keys.
        ranks: that share the checkpoint.

    Raises:
        OSError: something could not be written; the checkpoint before is as it was, and ``data`` is removed.
    """
    with _discarding(data) if ranks.rank == 0 else contextlib.nullcontext():
        _write(data, manifest, tensors, ranks)


def _write(data: Path, manifest: Mapping[str, Any], tensors: dict[str, Tensor], ranks: Ranks) -> None:
    error: Exception | None = None
    files: dict[str, list[Any]] = {}
    with ranks.together():
        writer = FileSystemWriter(data, sync_files=True)
    try:
        alone = ranks.size == 1
        with _without_warnings():
            dcp_save(tensors, storage_writer=writer, process_group=ranks.host_group, no_dist=alone)
        files = _checksums(data, ranks)
    except (Exception, CheckpointException) as found:  # whatever happened to any rank, on every rank
        error = found if isinstance(found, OSError) else OSError(f"{data} could not be written: {_innermost(found)}")
    ranks.raise_together(error)
    with ranks.together():
        if ranks.rank == 0:
            folder = data.parent
            write_manifest(folder, {"format": FORMAT_VERSION, "data": data.name, "files": files, **manifest})
            for other in folder.glob("data-*"):
                if other != data:
                    shutil.rmtree(other, ignore_errors=True)
            for draft in folder.glob(f"{MANIFEST}.*"):
                draft.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write beside, then rename: whoever opens the file finds all of the old one or all of the new one."""
    path = folder / MANIFEST
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("w") as file:
            json.dump({"checksum": _text_checksum(manifest), "manifest": manifest}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except Exception:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksums(data: Path, ranks: Ranks) -> dict[str, list[Any]]:
    """Size and checksum of every file, each computed by one rank."""
    ranks.gather(None)  # all have written
    with ranks.together():
        names = sorted(path.name for path in data.iterdir())
        mine = {name: file_checksum(data / name) for name in names[ranks.rank :: ranks.size]}
    return {name: checksum for part in ranks.gather(mine) for name, checksum in part.items()}


# -- reading -----------------------------------------------------------------------------------------------------------


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``directory`` holds; a warning names what a save that was cut off has left there.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: the manifest is damaged, or of a newer version.
    """
    folder = Path(directory)
    path = folder / MANIFEST
    unfinished = [other.name for other in sorted(folder.glob("data-*"))]
    if not path.exists():
        left = f" (only the unfinished {', '.join(unfinished)})" if unfinished else ""
        raise FileNotFoundError(f"{folder} has no complete checkpoint of Shampoo4{left}: there is no {MANIFEST}")
    try:
        sealed = json.loads(path.read_text())
        manifest: dict[str, Any] = sealed["manifest"]
        intact = sealed["checksum"] == _text_checksum(manifest)
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    if manifest["format"] > FORMAT_VERSION:
        raise ValueError(f"{folder} has format {manifest['format']}, this version reads up to {FORMAT_VERSION}")
    unfinished = [name for name in unfinished if name != manifest["data"]]
    if unfinished:
        warn(f"{folder} has {', '.join(unfinished)} of a save that was cut off: passed over")
    return manifest


def identity(folder: Path) -> tuple[int, ...]:
    """Identify the manifest file: equal on ranks that read one file, different for copies.

    The device is left out, since its number differs between nodes that share the file. Disks that are clones of one
    image look like one file.
    """
    found = (folder / MANIFEST).stat()
    return found.st_ino, found.st_ctime_ns


def verify(data: Path, files: Mapping[str, list[Any]], share: slice) -> None:
    """Raise ValueError if one of a ``share`` of the files, sorted by name, is missing or not as it was written."""
    for name in sorted(files)[share]:
        if not (data / name).exists():
            raise ValueError(f"{data / name} is missing")
        size, checksum = files[name]
        found_size, found = file_checksum(data / name)
        if found_size != size:
            raise ValueError(f"{data / name} has {found_size} bytes where {size} were written")
        if found != checksum:
            raise ValueError(f"{data / name} is damaged: its checksum does not fit")


def read(data: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Read ``tensors``, this rank's by their keys, in place; collective.

    Raises:
        ValueError: on every rank alike, if something could not be read.
    """
    error: Exception | None = None
    with ranks.together():
        reader = FileSystemReader(data)
        _prepare(reader, tensors)
    try:
        alone = ranks.size == 1
        with _without_warnings():
            dcp_load(tensors, storage_reader=reader, process_group=ranks.host_group, no_dist=alone)
    except (Exception, CheckpointException) as found:
        error = ValueError(f"{data.parent} could not be read: {_innermost(found)}")
    ranks.raise_together(error)
    with ranks.together():
        for tensor in tensors.values():
            if isinstance(tensor, Interval):
                tensor.settle()


def _prepare(reader: FileSystemReader, tensors: Mapping[str, Tensor]) -> None:
    """Have intervals be known as what is stored of them."""
    try:
        stored = reader.read_metadata().state_dict_metadata
    except Exception as found:
        raise ValueError(f"{reader.path} could not be read: {_innermost(found)}") from found
    for key, tensor in tensors.items():
        described = stored.get(key)
        if isinstance(tensor, Interval) and isinstance(described, TensorStorageMetadata):
            tensor.read_from(described.size)


def file_checksum(path: Path) -> list[Any]:
    """Return a file's size in bytes and its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return [path.stat().st_size, digest.hexdigest()]


def _text_checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore two warnings of DCP: that there is one process only, and that torch 2.9's calls deprecated functions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


def _innermost(error: BaseException) -> str:
    """What a wrapped error says at its root."""
    failures = getattr(error, "failures", None)  # DCP's CheckpointException: by rank
    if failures:
        first = next(iter(failures.values()))
        return _innermost(first[0] if isinstance(first, tuple) else first)
    return f"{type(error).__name__}: {error}"
