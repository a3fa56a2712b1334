"""One portable checkpoint: the same directory whatever the host and the number of ranks, for any other to load.

    save(optimizer, directory)      # collective: every rank calls it
    load(optimizer, directory)      # under any host, on any number of ranks; also collective

A directory holds ``manifest.json`` and a folder ``data-...`` that torch.distributed.checkpoint (DCP) wrote: the factors
of every block by the name of its parameter, and every parameter's values and base states as one flattened vector, of
which each rank writes, and reads, the interval that it holds. No rank ever has all of them.

The manifest is replaced in one go when everything else is on disk, and names the folder it belongs to. So a save that
is cut off at whatever moment leaves the checkpoint before it as it was. It also has the checksums of all files, which
are compared before anything is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from . import stored
from .bindings import Bindings
from .integrations import zero
from .optimizer import Shampoo4
from .ranks import Ranks

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def save(optimizer: Any, directory: str | os.PathLike[str]) -> None:
    """Write the optimizer's states and its parameters' values to ``directory``; collective.

    Args:
        optimizer: a Shampoo4, whatever ``prepare()`` made of one, or a DeepSpeed engine that has one. Its parameters
            need names, from ``named_parameters()`` or, under DeepSpeed, from the engine.
        directory: on storage that all ranks share. A checkpoint that it has already is replaced once the new one is
            complete; files of saves that were cut off are removed.

    Raises:
        OSError, ValueError: on every rank alike; the checkpoint that was there is untouched.
    """
    optimizer, engine = _unwrap(optimizer)
    bindings, ranks = _bind(optimizer, engine)
    folder = Path(directory)
    data = folder / ranks.gather(f"data-{uuid.uuid4().hex}")[0]
    error: Exception | None = None
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as found:
        error = found
    ranks.raise_together(error)
    parameters, tensors = stored.collect(optimizer, bindings, ranks)
    try:
        writer = FileSystemWriter(data, sync_files=True)
        with _one_process_is_meant():
            dcp_save(tensors, storage_writer=writer, process_group=ranks.host_group, no_dist=ranks.size == 1)
        files = _checksums(data, ranks)
    except (Exception, CheckpointException) as found:  # whatever happened to any rank, on every rank
        error = found if isinstance(found, OSError) else OSError(f"{data} could not be written: {_innermost(found)}")
        files = {}
    ranks.raise_together(error)
    if ranks.rank == 0:
        try:
            manifest = {"format": FORMAT_VERSION, "data": data.name, "files": files, **parameters}
            _replace(folder / MANIFEST, manifest)
            for other in folder.glob("data-*"):
                if other != data:
                    shutil.rmtree(other, ignore_errors=True)
            for draft in folder.glob(f"{MANIFEST}.*"):
                draft.unlink(missing_ok=True)
        except OSError as found:
            error = found
    ranks.raise_together(error)


def load(optimizer: Any, directory: str | os.PathLike[str]) -> None:
    """Restore what :func:`save` wrote, under this host and on this number of ranks; collective.

    The values of the trained parameters are restored with the states: buffers and frozen parameters are not in it.

    Raises:
        FileNotFoundError: ``directory`` has no complete checkpoint.
        ValueError: on every rank alike, with both values: a newer format, other parameters, shapes or options that
            shape stored bytes, another base optimizer, missing or damaged files. Nothing has been changed then.
    """
    optimizer, engine = _unwrap(optimizer)
    bindings, ranks = _bind(optimizer, engine)
    folder = Path(directory)
    error: Exception | None = None
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as found:
        error = found
    ranks.raise_together(error)
    try:
        stored.check(manifest, optimizer, bindings)
        _verify(folder / manifest["data"], manifest["files"], ranks)
    except (OSError, ValueError) as found:
        error = found
    ranks.raise_together(error)
    restoration = stored.Restoration(manifest, optimizer, bindings)
    try:
        reader = FileSystemReader(folder / manifest["data"])
        group, alone = ranks.host_group, ranks.size == 1
        with _one_process_is_meant():
            dcp_load(restoration.tensors, storage_reader=reader, process_group=group, no_dist=alone)
    except (Exception, CheckpointException) as found:
        error = ValueError(f"{folder} could not be read: {_innermost(found)}")
    ranks.raise_together(error)
    restoration.apply()
    if engine is not None:
        zero.refresh_weights(engine)


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``directory`` holds; a warning names what a save that was cut off has left there.

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
        warnings.warn(f"{folder} has {', '.join(unfinished)} of a save that was cut off: passed over", stacklevel=3)
    return manifest


def _unwrap(optimizer: Any) -> tuple[Shampoo4, Any]:
    """The Shampoo4 in whatever wrappers, and DeepSpeed's engine if there is one."""
    engine = None
    for _ in range(8):
        if isinstance(optimizer, Shampoo4):
            return optimizer, engine or optimizer._members.engine
        if hasattr(optimizer, "basic_optimizer"):
            engine, optimizer = optimizer, optimizer.basic_optimizer
        else:
            optimizer = getattr(optimizer, "optimizer", None)
    raise TypeError("checkpoints need a Shampoo4 optimizer, a wrapper around one, or a DeepSpeed engine that has one")


def _bind(optimizer: Shampoo4, engine: Any) -> tuple[Bindings, Ranks]:
    bindings = optimizer._bindings
    bindings.bind_all(optimizer.param_groups, optimizer.state, engine)
    assert bindings.ranks is not None
    return bindings, bindings.ranks


# -- files -------------------------------------------------------------------------------------------------------------


def _checksums(data: Path, ranks: Ranks) -> dict[str, list[Any]]:
    """Size and checksum of every file, each computed by one rank."""
    ranks.gather(None)  # all have written
    names = sorted(path.name for path in data.iterdir())
    mine = {name: _file_checksum(data / name) for name in names[ranks.rank :: ranks.size]}
    return {name: checksum for part in ranks.gather(mine) for name, checksum in part.items()}


def _verify(data: Path, files: Mapping[str, list[Any]], ranks: Ranks) -> None:
    for name in sorted(files)[ranks.rank :: ranks.size]:
        if not (data / name).exists():
            raise ValueError(f"{data / name} is missing")
        size, checksum = files[name]
        found_size, found = _file_checksum(data / name)
        if found_size != size:
            raise ValueError(f"{data / name} has {found_size} bytes where {size} were written")
        if found != checksum:
            raise ValueError(f"{data / name} is damaged: its checksum does not fit")


def _file_checksum(path: Path) -> list[Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return [path.stat().st_size, digest.hexdigest()]


def _text_checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write beside, then rename: whoever opens the file finds all of the old one or all of the new one."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with draft.open("w") as file:
        json.dump({"checksum": _text_checksum(manifest), "manifest": manifest}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without DCP's warning that it works for one process, which it has been told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _innermost(error: BaseException) -> str:
    """What a wrapped error says at its root."""
    failures = getattr(error, "failures", None)  # DCP's CheckpointException: by rank
    if failures:
        first = next(iter(failures.values()))
        return _innermost(first[0] if isinstance(first, tuple) else first)
    return f"{type(error).__name__}: {error}"
