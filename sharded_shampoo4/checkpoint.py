"""One portable checkpoint: the same directory whatever the host and the number of ranks, for any other to load.

    save(optimizer, directory)      # collective: every rank calls it
    load(optimizer, directory)      # under any host, on any number of ranks; also collective
    async_save(optimizer, directory).result()       # written while training goes on

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
import time
import uuid
import warnings
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from . import stored, untrained
from .context import own_arithmetic
from .fit import Fit, few
from .hosts import Host, of_engine, reshard
from .optimizer import Shampoo4
from .ranks import Ranks

FORMAT_VERSION = 2  # 1: the code book "normal" had other levels
MANIFEST = "manifest.json"
_STARTED = time.monotonic()


@own_arithmetic()
def save(
    optimizer: Any, directory: str | os.PathLike[str], *, model: nn.Module | None = None, frozen: bool = True
) -> None:
    """Write the optimizer's states and its parameters' values to ``directory``; collective.

    Args:
        optimizer: a Shampoo4, whatever ``prepare()`` made of one, or a DeepSpeed engine that has one, whose counters,
            loss scale and scheduler are saved too. Its parameters need names, from ``named_parameters()``, from
            ``model`` or, under DeepSpeed, from the engine.
        directory: on storage that all ranks of the optimizer's share, and a directory of its own for each optimizer (of
            ranks that train ``"alone"``, too). A checkpoint that it has already is replaced once the new one is
            complete; files of saves that were cut off are removed.
        model: wrapped as it is; its frozen parameters and its buffers are then saved as well. A DeepSpeed engine brings
            its own.
        frozen: False leaves out frozen parameters, such as the base model under adapters. Buffers are still saved.

    Raises:
        OSError, ValueError: on every rank alike; the checkpoint that was there is untouched. Also for a base optimizer
            whose states are neither numbers nor elementwise, such as bitsandbytes' codes.
    """
    subject = _Subject(optimizer, model, frozen, "checkpoint.save()")
    subject.wait_for_background()
    _write(_collect(subject, Path(directory)), subject.ranks)


@own_arithmetic()
def async_save(
    optimizer: Any, directory: str | os.PathLike[str], *, model: nn.Module | None = None, frozen: bool = True
) -> Future[None]:
    """Like :func:`save`, but the files are written in the background while training goes on; collective.

    What is saved is copied to the host first. Only one save of an optimizer is under way at a time: the next one, or a
    load, waits for it.

    Returns:
        ``.result()`` waits until the checkpoint is complete, and raises what :func:`save` would have raised. Call it
        before the process group is destroyed.
    """
    subject = _Subject(optimizer, model, frozen, "checkpoint.async_save()")
    subject.wait_for_background()
    background = subject.background()
    job = _collect(subject, Path(directory))
    with subject.ranks.together():
        job.tensors = {key: stored.on_host(tensor) for key, tensor in job.tensors.items()}
    background.pending = background.thread.submit(_write, job, background.ranks)
    return background.pending


@own_arithmetic()
def load(
    optimizer: Any, directory: str | os.PathLike[str], *, model: nn.Module | None = None, frozen: bool = True
) -> None:
    """Restore what :func:`save` wrote, under this host and on this number of ranks; collective.

    The values of the trained parameters are restored with the states; frozen parameters and buffers if ``model`` is
    given, as it was to ``save``. Names are compared without what wrappers put into them.

    Other layers may be frozen than when it was saved, and a warning names them. What was trained then and is frozen now
    gets its value (``model`` must be given, unless it stands in the optimizer's groups). What was frozen then, saved
    with ``model``, and is trained now gets its value and begins with fresh states.

    A low-bit base's states that can dequantise themselves, as torchao's do, are stored in float32 and quantised again,
    in the blocks that this rank's shards have: training then goes on but for one more rounding, not bitwise, under the
    same host too. ``state_dict()`` keeps the codes.

    Args:
        optimizer: as for :func:`save`.
        directory: that was saved to.
        model: wrapped as it is.
        frozen: False leaves parameters that need no gradient, and needed none, as they are.

    Raises:
        FileNotFoundError: ``directory`` has no complete checkpoint.
        ValueError: on every rank alike, with both values: a newer format, other parameters, shapes or options that
            shape stored bytes, another base optimizer, missing or damaged files. Nothing has been changed then.
    """
    subject = _Subject(optimizer, model, frozen, "checkpoint.load()")
    subject.wait_for_background()
    ranks, folder = subject.ranks, Path(directory)
    with ranks.together():
        manifest, in_files = stored.with_plain_names(read_manifest(folder))
    with ranks.together():
        others, with_model = subject.others(), subject.model is not None
        there = stored.check(manifest, subject.optimizer, subject.bindings, others, with_model, frozen)
        _verify(folder / manifest["data"], manifest["files"], ranks)
    _remark(manifest, there, with_model)
    with ranks.together():
        restoration = stored.Restoration(manifest, subject.optimizer, subject.bindings, there, in_files)
        reader = FileSystemReader(folder / manifest["data"])
    error: Exception | None = None
    try:
        group, alone = ranks.host_group, ranks.size == 1
        with _one_process_is_meant(alone):
            dcp_load(restoration.tensors, storage_reader=reader, process_group=group, no_dist=alone)
    except (Exception, CheckpointException) as found:
        error = ValueError(f"{folder} could not be read: {_innermost(found)}")
    ranks.raise_together(error)
    with ranks.together():
        restoration.apply()
    subject.host.refresh_weights()
    _restore_progress(subject.host, manifest.get("engine"), folder)


def _remark(manifest: Mapping[str, Any], there: Fit, with_model: bool) -> None:
    """Warn of what is not as it was."""
    left = manifest.get("untrained", {}).keys() - {key.partition("/")[2] for key in there.thawed.values()}
    if not with_model and left:
        names = few(name for name in manifest["untrained"] if name in left)
        warnings.warn(f"frozen parameters and buffers ({names}) are left as they are: give model=", stacklevel=3)
    for remark in there.remarks():
        warnings.warn(remark, stacklevel=3)


def _restore_progress(host: Host, saved: Mapping[str, Any] | None, folder: Path) -> None:
    """Give DeepSpeed's engine its counters, loss scale and scheduler back, and warn if they cannot move."""
    has_scheduler = getattr(host.engine, "lr_scheduler", None) is not None
    if host.engine is not None and saved is not None:
        host.restore_progress(saved)
    if has_scheduler and not (saved and saved["scheduler"]):
        warnings.warn(f"{folder} has no state of DeepSpeed's scheduler, which begins anew", stacklevel=3)
    elif saved and saved["scheduler"] and not has_scheduler:
        warnings.warn(f"{folder} has a state of DeepSpeed's scheduler, which is not used here", stacklevel=3)


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


class _Subject:
    """What is saved or loaded: an optimizer, bound to its parameters, with its ranks, its engine and its model."""

    def __init__(self, optimizer: Any, model: nn.Module | None, frozen: bool, calling: str) -> None:
        self.frozen = frozen
        self.optimizer, engine = _unwrap(optimizer)
        self.model = model if engine is None else engine
        if self.model is not None:
            reshard(self.model)
        self.bindings = self.optimizer._bindings
        self.bindings.bind_all(self.optimizer.param_groups, self.optimizer.state, self.optimizer, calling, self.model)
        self.host = self.bindings.members.host
        assert self.bindings.ranks is not None
        self.ranks = self.bindings.ranks

    def others(self) -> list[untrained.Untrained]:
        """What the model has beside trained parameters; without a model, what stands in the groups and is frozen."""
        groups = self.optimizer.param_groups
        if self.model is None:
            return self.bindings.frozen(groups)
        held = self.bindings.everything(groups)
        trained = [tensor for entry, _, _ in held for tensor in (entry.parameter, entry.holder)]
        given = [parameter for _, parameter, _ in self.bindings.members.given() if parameter is not None]
        trained += [parameter for parameter in given if parameter.requires_grad]
        return untrained.find(self.model, trained, self.host)

    def saved_others(self) -> list[untrained.Untrained]:
        """What of those is saved."""
        if self.model is None:
            return []
        return [other for other in self.others() if self.frozen or not other.frozen]

    def background(self) -> _Background:
        """The thread for this optimizer, made by its first save in the background; collective then."""
        found = _BACKGROUNDS.get(self.optimizer)
        if found is None:
            found = _BACKGROUNDS[self.optimizer] = _Background(self.ranks.beside())
        return found

    def wait_for_background(self) -> None:
        """Until a save in the background has ended, well or not."""
        found = _BACKGROUNDS.get(self.optimizer)
        if found is not None and found.pending is not None:
            wait([found.pending])


class _Background:
    """A thread that writes, and ranks whose collectives do not mix with those of the training."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None


_BACKGROUNDS: weakref.WeakKeyDictionary[Shampoo4, _Background] = weakref.WeakKeyDictionary()


def _unwrap(optimizer: Any) -> tuple[Shampoo4, Any]:
    """The Shampoo4 in whatever wrappers, and the framework's engine if there is one; the Shampoo4 is told of it."""
    host: Host | None = None
    for _ in range(8):
        if isinstance(optimizer, Shampoo4):
            if host is not None and optimizer._members.host.engine is None:
                optimizer.use_host(host)
            return optimizer, optimizer._members.host.engine
        found = of_engine(optimizer)
        if found is not None:
            host, optimizer = found
        else:
            optimizer = getattr(optimizer, "optimizer", None)
    raise TypeError("checkpoints need a Shampoo4 optimizer, a wrapper around one, or a DeepSpeed engine that has one")


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One checkpoint to write: where, what its manifest says, and this rank's tensors."""

    folder: Path
    data: Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]


def _collect(subject: _Subject, folder: Path) -> _Job:
    ranks = subject.ranks
    of_some = "" if ranks.first is None else f"rank{ranks.first}-"
    data = folder / ranks.gather(f"data-{of_some}{uuid.uuid4().hex}")[0]
    with ranks.together():
        data.mkdir(parents=True, exist_ok=True)
        if of_some:
            _refuse_shared(data, of_some)
        others = subject.saved_others()
    manifest, tensors = stored.collect(subject.optimizer, subject.bindings, ranks, others)
    manifest["frozen"] = subject.frozen
    progress = subject.host.progress()
    if progress is not None:
        manifest["engine"] = progress
    return _Job(folder, data, manifest, tensors)


def _refuse_shared(data: Path, of_some: str) -> None:
    """Raise ValueError if, since this process was started, ranks that train something else have saved there as well."""
    started = data.stat().st_mtime - (time.monotonic() - _STARTED)
    for other in data.parent.glob("data-rank*-*"):
        if not other.name.startswith(f"data-{of_some}") and other.stat().st_mtime > started:
            shutil.rmtree(data, ignore_errors=True)
            ranks = other.name.split("-")[1].replace("rank", "rank ")
            raise ValueError(
                f"{data.parent} has a checkpoint that {ranks} writes in this run, with an optimizer of other ranks "
                "(process_group=, or a mesh): give each of them a directory of its own"
            )


def _write(job: _Job, ranks: Ranks) -> None:
    """Write the files, then the manifest that makes them count; collective."""
    error: Exception | None = None
    files: dict[str, list[Any]] = {}
    with ranks.together():
        writer = FileSystemWriter(job.data, sync_files=True)
    try:
        group, alone = ranks.host_group, ranks.size == 1
        with _one_process_is_meant(alone):
            dcp_save(job.tensors, storage_writer=writer, process_group=group, no_dist=alone)
        files = _checksums(job.data, ranks)
    except (Exception, CheckpointException) as found:  # whatever happened to any rank, on every rank
        message = f"{job.data} could not be written: {_innermost(found)}"
        error = found if isinstance(found, OSError) else OSError(message)
    ranks.raise_together(error)
    with ranks.together():
        if ranks.rank == 0:
            manifest = {"format": FORMAT_VERSION, "data": job.data.name, "files": files, **job.manifest}
            _replace(job.folder / MANIFEST, manifest)
            for other in job.folder.glob("data-*"):
                if other != job.data:
                    shutil.rmtree(other, ignore_errors=True)
            for draft in job.folder.glob(f"{MANIFEST}.*"):
                draft.unlink(missing_ok=True)


# -- files -------------------------------------------------------------------------------------------------------------


def _checksums(data: Path, ranks: Ranks) -> dict[str, list[Any]]:
    """Size and checksum of every file, each computed by one rank."""
    ranks.gather(None)  # all have written
    with ranks.together():
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
def _one_process_is_meant(alone: bool) -> Iterator[None]:
    """Without DCP's warning that it works for one process, which it has been told to."""
    if not alone:
        yield
        return
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
