"""Where the rows live under DeepSpeed ZeRO 1, 2 and 3, read off what ZeRO itself keeps beside each parameter.

ZeRO replaces the parameters in an optimizer's groups by flat tensors of its own, of which each rank has one part, and
calls ``step()`` with one of them at a time. The parameters that the optimizer was given stay in the model and tell
where they went:

==================  =======================================  ==========================================================
stage               what a flat tensor holds                 what tells a parameter's interval
==================  =======================================  ==========================================================
1, 2, BF16          1/W of a group's parameters in a row     the offset of its weights in the storage that they share
3                   1/W of each parameter of a sub-group     ``grad_position`` of ZeRO's optimizer
==================  =======================================  ==========================================================

At stage 0 nothing is flat: parameters, or copies of them in float32, are whole on every rank. The engine, which knows
the configuration and the parameters' names, is found among the callers of the optimizer. Nothing here imports
DeepSpeed: :mod:`.deepspeed` does.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sharded_shampoo4.hosts import FlatTensor, Host
from sharded_shampoo4.planning.shards import Shard, make_shard
from sharded_shampoo4.values import to_integer

from .callers import DEEPSPEED_ENGINE, callers


class Fragment(NamedTuple):
    """A parameter's shard on this rank, and where it begins in the flat tensor."""

    shard: Shard
    offset: int


class Untested(NamedTuple):
    """A feature that is refused: where the engine tells it, what it is when off, its name, what to do instead."""

    path: str
    off: tuple[Any, ...]
    option: str
    instead: str = "leave it out"


_ALWAYS = (
    Untested(
        "has_moe_layers",
        (False,),
        "a mixture of experts (deepspeed.moe, expert parallelism)",
        "use a dense model, or experts that every rank has, without deepspeed.moe.layer.MoE",
    ),
    Untested("pipeline_parallelism", (False,), "pipeline parallelism", "use a model that is no PipelineModule"),
    Untested("_config.tensor_parallel_config.autotp_size", (0, 1), "tensor_parallel.autotp_size"),
    Untested("_config.compile_config.deepcompile", (False,), "compile.deepcompile"),
    Untested("_config.torch_autocast_enabled", (False,), "torch_autocast", 'use "bf16" or "fp16"'),
)
_ZERO = (
    Untested("elastic_checkpoint", (False,), "elastic_checkpoint"),
    Untested("offload_optimizer.device", ("none", "cpu"), "offload_optimizer.device", 'use "cpu"'),
    Untested("offload_optimizer.ratio", (1.0,), "offload_optimizer.ratio"),
    Untested("offload_optimizer.super_offload", (False,), "offload_optimizer.super_offload"),
    Untested("offload_param.device", ("none", "cpu"), "offload_param.device", 'use "cpu"'),
    Untested("zero_hpz_partition_size", (0, 1), "zero_hpz_partition_size (ZeRO++)"),
    Untested("zero_quantized_weights", (False,), "zero_quantized_weights (ZeRO++)"),
    Untested("zero_quantized_nontrainable_weights", (False,), "zero_quantized_nontrainable_weights (ZeRO++)"),
    Untested("zero_quantized_gradients", (False,), "zero_quantized_gradients (ZeRO++)"),
    Untested("zenflow", (None,), "zenflow"),
)


_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroHost(Host):
    """DeepSpeed, at any stage. ``engine`` is the one that calls the optimizer; None before it is known."""

    def __init__(self, engine: Any = None) -> None:
        self._engine = None if engine is None else weakref.ref(engine)

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine, or None."""
        return None if self._engine is None else self._engine()

    @classmethod
    def find(cls, optimizer: Optimizer | None, parameters: Sequence[Tensor]) -> Host | None:
        """Return a host if an engine is calling ``optimizer``, or ZeRO has taken any of ``parameters`` over."""
        engine = None if optimizer is None else _find_engine(optimizer)
        if engine is not None or any(_is_partitioned(p) or _is_initialized_partitioned(p) for p in parameters):
            return cls(engine)
        return None

    @classmethod
    def of_engine(cls, handle: Any) -> tuple[Host, Optimizer] | None:
        """Return the host and the optimizer that was given to ``deepspeed.initialize`` if ``handle`` is an engine."""
        return (cls(handle), handle.basic_optimizer) if cls.is_wrapper(handle) else None

    @staticmethod
    def is_wrapper(module: Any) -> bool:
        """Return whether ``module`` is an engine."""
        return hasattr(module, "basic_optimizer")

    # -- about one parameter -------------------------------------------------------------------------------------------

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the shape of the whole parameter, also while stage 3 keeps only a part of it."""
        return _whole_shape(parameter)

    def check_parameter(self, name: str, parameter: Tensor, holder: Tensor, preconditioned: bool) -> None:
        """Raise ValueError for a parameter at stage 3 that stands in a group itself."""
        if holder is parameter and _is_initialized_partitioned(parameter):
            raise ValueError(
                f"{name} is partitioned by deepspeed.zero.Init, but the optimizer was not given to "
                "deepspeed.initialize at stage 3"
            )

    def locate(self, name: str, parameter: Tensor, holder: Tensor) -> tuple[Shard, int]:
        """Return the interval of ``parameter`` that ``holder`` has on this rank, and where it begins there.

        Raises:
            ValueError: ZeRO's records are missing or contradict each other, or only some of the ranks share the
                parameter.
        """
        if holder is parameter:
            return super().locate(name, parameter, holder)
        if _is_stage_3(parameter):
            return _locate_stage_3(name, parameter, holder)
        fragment = _locate_flat(name, parameter, holder)
        if (
            not self.engine.zero_round_robin_gradients()
        ):  # DeepSpeed 0.19.8 maps parameters in another order than it keeps
            _check_against_mapping(name, parameter, fragment)
        return fragment

    def frozen_part(self, name: str, parameter: Tensor) -> tuple[Tensor, Shard]:
        """Return this rank's elements of a frozen parameter, and where they lie in it."""
        if not _is_initialized_partitioned(parameter):
            return super().frozen_part(name, parameter)
        shard = _stage_3_interval(parameter)
        held: Tensor = parameter.ds_tensor.data.view(-1)[: shard.length]  # type: ignore[attr-defined]
        return held, shard

    def compute_device(self, holder: Tensor) -> torch.device:
        """Return the accelerator, also if ``holder`` is a flat tensor that is offloaded.

        The process group may not be able to send from the host.
        """
        if self.engine is None or self.engine.zero_optimization_stage() == 0 or holder.device.type != "cpu":
            return super().compute_device(holder)
        from deepspeed.accelerator import get_accelerator  # type: ignore[import-untyped]

        return torch.device(get_accelerator().current_device_name())

    # -- about flat tensors --------------------------------------------------------------------------------------------

    def has_flat_tensors(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether ZeRO 1, 2 or 3 has taken any of ``parameters`` over."""
        return any(map(_is_partitioned, parameters))

    def flat_tensors(self, group: int, standing: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[FlatTensor]:
        """Return the flat tensors with a group's ``parameters``: what stands in it, but at stage 3 nothing does."""
        zero = _stage_3(parameters)
        if zero is None:
            members = [parameter for parameter in parameters if hasattr(parameter, "_hp_mapping")]
            return [FlatTensor(flat, members, group) for flat in standing]
        own = set(map(id, parameters))
        sub_groups = enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        return [
            FlatTensor(flat, list(members), ("sub-group", number))
            for number, (flat, members) in sub_groups
            if members and id(members[0]) in own
        ]

    @property
    def steps_once(self) -> bool:
        """Whether ``step()`` is given all flat tensors together."""
        return type(getattr(self.engine, "optimizer", None)).__name__ == "BF16_Optimizer"

    # -- about the engine ----------------------------------------------------------------------------------------------

    def names(self) -> Mapping[Tensor, str]:
        """Return the engine's names of parameters."""
        return getattr(self.engine, "param_names", None) or {}

    def check(self, process_group: Any, first: str) -> None:
        """Raise ValueError, naming the option and what to do, if DeepSpeed runs with a feature that was not tested."""
        if self.engine is None:
            raise ValueError(
                "ZeRO has partitioned the parameters, but the optimizer is not called by a DeepSpeed engine: use "
                "engine.step(), and one engine for one optimizer"
            )
        refuse_untested(self.engine)
        if process_group is not None:
            shown = repr(process_group) if isinstance(process_group, str) else "a group"
            raise ValueError(
                f"process_group is {shown}, but DeepSpeed shares {first} among all ranks: leave process_group out"
            )

    @property
    def total_steps(self) -> int | None:
        """Return ``total_num_steps`` of the configuration's scheduler, if it has one."""
        steps = to_integer((self.engine.scheduler_params() or {}).get("total_num_steps")) if self.engine else None
        return steps if isinstance(steps, int) else None

    def progress(self) -> dict[str, Any] | None:
        """Return the engine's counters, loss scale and scheduler. Raises ValueError if JSON cannot hold its state."""
        from sharded_shampoo4.checkpoint import schedulers  # its imports take a while

        engine = self.engine
        if engine is None:
            return None
        scaler, scheduler = _loss_scaler(engine), engine.lr_scheduler
        return {
            "counters": {name: getattr(engine, name) for name in _COUNTERS},
            "loss_scale": {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)},
            "dynamic_loss_scale": _is_dynamic(scaler),
            "scheduler": schedulers.to_json(scheduler),
            "scheduler_class": None if scheduler is None else schedulers.kind(scheduler),
        }

    def restore_progress(self, saved: Mapping[str, Any]) -> None:
        """Undo :meth:`progress`. Only a dynamic loss scale moves, and only to an engine that has one too."""
        engine = self.engine
        for name, value in saved["counters"].items():
            setattr(engine, name, value)
        scaler, scale = _loss_scaler(engine), saved["loss_scale"]
        # Without a mark, as early versions saved, this is None or missing for a fixed scale.
        dynamic = saved.get("dynamic_loss_scale", scale.get("last_overflow_iter") is not None)
        if dynamic and _is_dynamic(scaler):
            for name, value in scale.items():
                if hasattr(scaler, name):
                    setattr(scaler, name, value)
        if saved["scheduler"] and engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(saved["scheduler"])

    def refresh_weights(self) -> None:
        """Make the engine's weights those of its optimizer, after these were loaded; collective."""
        if self.engine is not None:
            _refresh_weights(self.engine)


def _is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO 1, 2 or 3 has taken this parameter over."""
    return _is_stage_3(parameter) or hasattr(parameter, "_hp_mapping")


def _is_initialized_partitioned(parameter: Tensor) -> bool:
    """Whether this parameter was partitioned by ``deepspeed.zero.Init`` or an engine at stage 3."""
    return hasattr(parameter, "ds_id")


def _whole_shape(parameter: Tensor) -> torch.Size:
    shape = getattr(parameter, "ds_shape", None)
    return parameter.shape if shape is None else torch.Size(shape)


def _loss_scaler(engine: Any) -> Any:
    """What has the loss scale: a scaler at stages 1 to 3, a configuration in the optimizers of stage 0."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _is_dynamic(scaler: Any) -> bool:
    return bool(getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False))


def _refresh_weights(engine: Any) -> None:
    """Make an engine's weights those of its optimizer, after these were loaded; collective."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.checkpoint_event_epilogue()
    elif engine.zero_optimization_stage() > 0:
        partitions = getattr(zero, "parallel_partitioned_bit16_groups", None) or zero.bf16_partitioned_groups
        masters = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        for parts, master, group in zip(partitions, masters, zero.real_dp_process_group, strict=True):
            parts[dist.get_rank(group)].data.copy_(master.data)
            dist.all_gather([part.data for part in parts], parts[dist.get_rank(group)].data.clone(), group=group)
    elif zero is not engine.basic_optimizer:
        for weights, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.data)


def _find_engine(optimizer: Optimizer) -> Any:
    """The DeepSpeed engine that works with ``optimizer`` and is just calling it; None if none is.

    An engine keeps its optimizer, but neither the optimizer nor the parameters tell of their engine.
    """
    engines = (engine for engine in callers(DEEPSPEED_ENGINE) if getattr(engine, "basic_optimizer", None) is optimizer)
    return next(engines, None)


def refuse_untested(engine: Any) -> None:
    """Raise ValueError, naming the option and what to do, if ``engine`` runs with a feature that was not tested."""
    checks = [(engine, "", untested) for untested in _ALWAYS]
    if engine.zero_optimization_stage() > 0:
        checks += [(engine._config.zero_config, "zero_optimization.", untested) for untested in _ZERO]
    for holder, section, (path, off, option, instead) in checks:
        value = _follow(holder, path)
        if value is not _ABSENT and value not in off:
            shown = getattr(value, "value", value)
            raise ValueError(
                f"DeepSpeed runs with {section}{option} = {shown!r}: Shampoo4 was not tested with that; {instead}"
            )


# -- the stages --------------------------------------------------------------------------------------------------------


def _is_stage_3(parameter: Tensor) -> bool:
    return hasattr(parameter, "_z3_optimizer")


def _stage_3(parameters: Sequence[Tensor]) -> Any:
    return next((zero for zero in (getattr(p, "_z3_optimizer", None) for p in parameters) if zero is not None), None)


_ABSENT = object()


def _follow(holder: Any, path: str) -> Any:
    """The attribute at a dotted ``path``; ``_ABSENT`` if there is none, or a part of it is None."""
    *parts, last = path.split(".")
    for part in parts:
        holder = getattr(holder, part, None)
    return getattr(holder, last, _ABSENT)


def _stage_3_interval(parameter: Any) -> Shard:
    """Equal parts of each parameter, the last ones padded or empty."""
    size, shape = parameter.partition_numel(), _whole_shape(parameter)
    start = min(dist.get_rank(parameter.ds_process_group) * size, shape.numel())
    return make_shard(start, min(start + size, shape.numel()))


def _locate_stage_3(name: str, parameter: Any, flat: Tensor) -> Fragment:
    _check_group(name, parameter.ds_process_group)
    number, offset, size = parameter._z3_optimizer.grad_position[parameter.ds_id]
    shape = _whole_shape(parameter)
    if flat is not parameter._z3_optimizer.fp32_partitioned_groups_flat[number] or size != parameter.partition_numel():
        raise ValueError(f"ZeRO 3 has moved {name} of shape {tuple(shape)} since it was started")
    shard = _stage_3_interval(parameter)
    _check_inside(name, offset, shard, flat)
    return Fragment(shard, offset)


def _locate_flat(name: str, parameter: Any, flat: Tensor) -> Fragment:
    """Stages 1, 2 and BF16: a group's weights are views into one buffer, of which each rank updates an equal part."""
    group = parameter._dp_group
    _check_group(name, group)
    weights = parameter.untyped_storage().nbytes() // parameter.element_size()
    if weights != flat.numel() * dist.get_world_size(group):
        raise ValueError(
            f"the weights of {name} are in a storage of {weights} elements, not of {dist.get_world_size(group)} times "
            f"the {flat.numel()} of ZeRO's flat tensor: were they moved or offloaded?"
        )
    first = dist.get_rank(group) * flat.numel()  # of this rank's elements in the buffer
    begin, numel = parameter.storage_offset(), parameter.numel()
    shard = make_shard(min(max(first - begin, 0), numel), min(max(first + flat.numel() - begin, 0), numel))
    offset = begin + shard.start - first if shard.stop else 0
    _check_inside(name, offset, shard, flat)
    return Fragment(shard, offset)


def _check_against_mapping(name: str, parameter: Any, fragment: Fragment) -> None:
    """Compare with what ZeRO says of its float32 weights."""
    mapping, (shard, offset) = parameter._hp_mapping, fragment
    expected = (0, 0) if mapping is None else (mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)
    found = (offset, shard.length)
    if found != expected:
        raise ValueError(f"ZeRO's records of {name} disagree: (start, elements) are {expected} and {found}")


def _check_group(name: str, group: dist.ProcessGroup) -> None:
    size, world = dist.get_world_size(group), dist.get_world_size()
    if size != world:
        raise ValueError(
            f"ZeRO shards {name} among {size} of {world} ranks (tensor, pipeline or expert parallelism, or MiCS): "
            "Shampoo4 was not tested with that; shard among all ranks, without mpu=, MoE layers and mics_shard_size"
        )


def _check_inside(name: str, offset: int, shard: Shard, flat: Tensor) -> None:
    if offset < 0 or offset + shard.length > flat.numel():
        raise ValueError(f"the part of {name} does not lie inside ZeRO's flat tensor of {flat.numel()} elements")
