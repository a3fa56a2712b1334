"""One portable checkpoint: the same directory whatever the host and the number of ranks, for any other to load.

::

    save(optimizer, directory)      # collective: every rank calls it
    load(optimizer, directory)      # under any host, on any number of ranks; also collective
    async_save(optimizer, directory).result()       # written while training goes on

A directory holds ``manifest.json`` and a folder ``data-...`` that torch.distributed.checkpoint (DCP) wrote: the factors
of every block by the name of its parameter, and every parameter's values and base states as one flattened vector, of
which each rank writes, and reads, the interval that it holds. No rank ever has all of them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import nn

from ..comm.ranks import Ranks
from ..context import own_arithmetic
from ..hosts import Host
from ..optimizer import Shampoo4
from ..report import shorten, warn
from . import files, schedulers
from .consistency import Seen, check_seen, own_share
from .contents import collect
from .files import MANIFEST, read_manifest
from .fit import Fit
from .restore import Restoration, check, with_plain_names
from .subject import Subject
from .vectors import on_host

__all__ = ["MANIFEST", "async_save", "load", "read_manifest", "save"]


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
        OSError, ValueError: on every rank alike. Unless the new checkpoint was complete by then, what was written is
            removed, and the checkpoint that was there is untouched. Also for a base optimizer whose states are neither
            numbers nor elementwise, such as bitsandbytes' codes; for buffers and frozen parameters that are sparse or
            expanded; and where ranks train different parameters or were given different arguments.
    """
    subject = Subject(optimizer, model, frozen, "checkpoint.save()")
    _wait_for_background(subject.optimizer)
    manifest, tensors = collect(subject)
    data = files.new_data_folder(directory, subject.ranks)
    files.write(data, manifest, tensors, subject.ranks)


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
    subject = Subject(optimizer, model, frozen, "checkpoint.async_save()")
    _wait_for_background(subject.optimizer)
    background = _BACKGROUNDS.get(subject.optimizer)
    if background is None or background.ranks.gone:
        background = _BACKGROUNDS[subject.optimizer] = _Background(subject.ranks.duplicate())
    manifest, tensors = collect(subject)
    with subject.ranks.together():
        tensors = {key: on_host(tensor) for key, tensor in tensors.items()}
    data = files.new_data_folder(directory, subject.ranks)
    background.pending = background.thread.submit(files.write, data, manifest, tensors, background.ranks)
    return background.pending


@own_arithmetic()
def load(
    optimizer: Any, directory: str | os.PathLike[str], *, model: nn.Module | None = None, frozen: bool = True
) -> None:
    """Restore what :func:`save` wrote, under this host and on this number of ranks; collective.

    The values of the trained parameters are restored with the states; frozen parameters and buffers if ``model`` is
    given, as it was to ``save``. Names are compared without what wrappers put into them. Whole weights that an
    evaluation under FSDP1 or FSDP2 has left in use are given up, with or without ``model``.

    Other layers may be frozen than when it was saved, and a warning names them. What was trained then and is frozen now
    gets its value (``model`` must be given, unless it stands in the optimizer's groups). What was frozen then, saved
    with ``model``, and is trained now gets its value and begins with fresh states.

    A low-bit base's states that can dequantize themselves, as torchao's do, are stored in float32 and quantized again,
    in the blocks that this rank's shards have: training then goes on up to one more rounding, not bitwise, under the
    same host too. ``state_dict()`` keeps the codes.

    Args:
        optimizer: as for :func:`save`.
        directory: that was saved to.
        model: wrapped as it is.
        frozen: False leaves parameters that need no gradient, and needed none, as they are.

    Raises:
        FileNotFoundError: ``directory`` has no complete checkpoint.
        ValueError: on every rank alike, with both values: a newer format, other parameters, shapes or options that
            shape stored bytes, another base optimizer, missing or damaged files, ranks that find different checkpoints
            in their directories. Nothing has been changed then.
    """
    subject = Subject(optimizer, model, frozen, "checkpoint.load()")
    _wait_for_background(subject.optimizer)
    ranks = subject.ranks
    with ranks.together():
        folder = Path(directory)
        subject.give_up_whole_weights()
    manifest, share = _read_together(subject, folder)
    data = folder / manifest["data"]
    with ranks.together():
        manifest, in_files = with_plain_names(manifest)
        found = check(manifest, subject)
        files.verify(data, manifest["files"], share)
    _remark(manifest, found, subject)
    with ranks.together():
        restoration = Restoration(manifest, subject, found, in_files)
        progress = _fit_progress(subject.host, manifest.get("engine"), folder)
    files.read(data, restoration.tensors, ranks)
    with ranks.together():
        restoration.apply()
    subject.host.refresh_weights()
    _restore_progress(subject.host, progress)


def _read_together(subject: Subject, folder: Path) -> tuple[dict[str, Any], slice]:
    """Read the manifest, the same on every rank, and tell which of its files this rank must check; collective."""
    error: Exception | None = None
    manifest, seen = dict[str, Any](), None
    try:
        manifest = read_manifest(folder)
        seen = Seen(subject.arguments, folder / manifest["data"], files.identity(folder))
    except Exception as found:
        error = found
    gathered: list[Seen | None] = subject.ranks.gather(seen)
    everyone = [other for other in gathered if other is not None]
    if len(everyone) < len(gathered):
        subject.ranks.raise_together(error)
    check_seen(everyone)
    return manifest, own_share(everyone, subject.ranks.rank)


def _remark(manifest: Mapping[str, Any], found: Fit, subject: Subject) -> None:
    """Warn of what is not as it was."""
    left = manifest.get("untrained", {}).keys() - {key.partition("/")[2] for key in found.thawed.values()}
    if subject.model is None and left:
        names = shorten(name for name in manifest["untrained"] if name in left)
        warn(f"frozen parameters and buffers ({names}) are left as they are: give model=")
    for remark in found.remarks():
        warn(remark)


def _fit_progress(host: Host, saved: Mapping[str, Any] | None, folder: Path) -> Mapping[str, Any] | None:
    """Prepare what DeepSpeed's engine gets back, and warn if its scheduler's state cannot move."""
    scheduler = getattr(host.engine, "lr_scheduler", None)
    state = saved["scheduler"] if saved else None
    if scheduler is None or not saved or not state:
        if scheduler is not None:
            warn(f"{folder} has no state of DeepSpeed's scheduler, which begins anew")
        elif state:
            warn(f"{folder} has a state of DeepSpeed's scheduler, which is not used here")
        return saved
    if schedulers.is_of(saved, scheduler):
        return {**saved, "scheduler": schedulers.from_json(state, scheduler)}
    there, here = saved.get("scheduler_class") or "a scheduler with other keys", schedulers.kind(scheduler)
    warn(f"{folder} has the state of {there}, but DeepSpeed's scheduler is {here}, which begins anew")
    return {**saved, "scheduler": {}}


def _restore_progress(host: Host, saved: Mapping[str, Any] | None) -> None:
    """Give DeepSpeed's engine its counters, loss scale and scheduler back."""
    if host.engine is not None and saved is not None:
        host.restore_progress(saved)


class _Background:
    """A thread that writes, and ranks whose collectives do not mix with those of the training."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None


_BACKGROUNDS: weakref.WeakKeyDictionary[Shampoo4, _Background] = weakref.WeakKeyDictionary()


def _wait_for_background(optimizer: Shampoo4) -> None:
    """Wait until a save in the background has ended, well or not."""
    found = _BACKGROUNDS.get(optimizer)
    if found is not None and found.pending is not None:
        wait([found.pending])
