"""The optimizer: 4-bit Shampoo around any elementwise torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import packing
from .binding import Binding, Candidate
from .integrations import fsdp as hosts
from .layout import matrix_shape
from .memory import describe_parameter, format_bytes, table, tensor_bytes
from .options import (
    Bits,
    CodeBook,
    GraftingScope,
    PreconditionerOptions,
    Quantize,
    RefreshDtype,
    Split,
    base_arguments,
    base_class,
    check_group,
)
from .plan import Shard
from .preconditioner import Matrix
from .ranks import Ranks


class Shampoo4(Optimizer):
    """Shampoo with preconditioners kept as eigenvalues and a 4-bit eigenbasis (Wang et al., NeurIPS 2024).

    Every parameter with a matrix view (size-1 dimensions dropped, reshaped to (first, rest), rank 2) is cut into
    blocks. At each step a block's gradient G is replaced by L^(-1/4) G R^(-1/4), grafted to the gradient's norm, and
    the base optimizer then takes this direction as its gradient: **p.grad is overwritten**. L and R are running
    averages of G G^T and G^T G. Parameters without a matrix view go to the base as they are.

    In step t of a parameter, counted from 1: statistics are absorbed if ``t % statistics_interval == 0``, then inverse
    roots are recomputed if ``t % root_interval == 0``. Before the first root the direction is the gradient.

    Args:
        params: tensors, parameter groups, or ``model.named_parameters()`` (names then stand in messages). Every option
            below, but for ``base``, may also stand in a group.
        lr: learning rate of the base optimizer.
        base: ``"adamw"``, ``"sgd"``, ``"adagrad"``, or an elementwise torch optimizer class.
        weight_decay: weight decay of the base optimizer.
        precondition: False leaves a group's parameters to the base alone.
        bits: 3, 4 or 8 bits per stored matrix element; 32 is the reference Shampoo, which keeps L and R themselves.
        quantize: ``"eigenbasis"``, or ``"preconditioner"``, which quantises L and R (the paper's naive baseline).
        codebook: ``"linear2"`` or ``"dynamic_tree"``.
        quant_block_size: elements that share one float32 scale.
        min_quant_numel: a factor whose matrix has fewer elements stays in float32.
        shampoo_beta: decay of the statistics' running average.
        matrix_eps: initial statistics, and ridge of the inverse root relative to the largest eigenvalue.
        statistics_interval: T1, steps between statistics.
        root_interval: T2, steps between inverse roots.
        rectify_steps: steps of Björck's iteration before a statistics update and before a root.
        refresh_dtype: arithmetic of statistics and root steps, ``"float64"`` or ``"float32"``.
        max_preconditioner_dim: the most rows or columns of a block.
        split: ``"even"`` cuts a side into parts of about equal size, ``"remainder"`` into full parts and a rest.
        grafting: whose norm the direction takes: the ``"parameter"``'s gradient, the ``"block"``'s, or ``"none"``.
        max_failures: failed updates of one factor in a row before ``step`` raises. A failed update (numbers that are
            not finite) leaves the factor as it was.
        **base_options: further options of the base optimizer, such as ``betas`` or ``momentum``.

    Raises:
        TypeError: an option that is neither ours nor the base optimizer's, or a parameter that is no tensor.
        ValueError: an option's value that makes no sense.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        base: str | type[Optimizer] = "adamw",
        weight_decay: float = 0.0,
        precondition: bool = True,
        bits: Bits = 4,
        quantize: Quantize = "eigenbasis",
        codebook: CodeBook = "linear2",
        quant_block_size: int = 64,
        min_quant_numel: int = 4096,
        shampoo_beta: float = 0.95,
        matrix_eps: float = 1e-6,
        statistics_interval: int = 100,
        root_interval: int = 500,
        rectify_steps: tuple[int, int] = (1, 4),
        refresh_dtype: RefreshDtype = "float64",
        max_preconditioner_dim: int = 1024,
        split: Split = "even",
        grafting: GraftingScope = "parameter",
        max_failures: int = 10,
        **base_options: Any,
    ) -> None:
        options = PreconditionerOptions(
            precondition=precondition,
            bits=bits,
            quantize=quantize,
            codebook=codebook,
            quant_block_size=quant_block_size,
            min_quant_numel=min_quant_numel,
            shampoo_beta=shampoo_beta,
            matrix_eps=matrix_eps,
            statistics_interval=statistics_interval,
            root_interval=root_interval,
            rectify_steps=rectify_steps,
            refresh_dtype=refresh_dtype,
            max_preconditioner_dim=max_preconditioner_dim,
            split=split,
            grafting=grafting,
            max_failures=max_failures,
        )
        rule = base_class(base)
        self._base_arguments = base_arguments(rule, lr, weight_decay, base_options)
        # The base sees a stand-in only: hosts replace parameters after construction, so nothing is kept of them yet.
        self._base = rule([torch.nn.Parameter(torch.zeros(1))], **self._base_arguments)
        self._base_makes_state_early = bool(self._base.state)
        self._binding: Binding | None = None
        self._ranks: Ranks | None = None
        self._locations: dict[Tensor, hosts.Location] = {}  # of parameters that cannot tell where they live
        self._unbound: dict[Tensor, packing.PackedState] = {}  # factors of parameters that are not bound (yet)
        self._consolidated: dict[Tensor, Tensor] = {}  # all factors, until the next step
        defaults = {"lr": lr, "weight_decay": weight_decay, **self._base.defaults, **options.as_group()}
        super().__init__(params, {**defaults, packing.VERSION_KEY: packing.FORMAT_VERSION})

    @staticmethod
    def paper_settings() -> dict[str, Any]:
        """Options as published where they differ from ours: ``Shampoo4(params, **Shampoo4.paper_settings())``."""
        return {
            "bits": 4,
            "quantize": "eigenbasis",
            "codebook": "linear2",
            "quant_block_size": 64,
            "min_quant_numel": 4096,
            "shampoo_beta": 0.95,
            "matrix_eps": 1e-6,
            "statistics_interval": 100,
            "root_interval": 500,
            "rectify_steps": (1, 4),
            "max_preconditioner_dim": 1200,
            "split": "remainder",
            "grafting": "parameter",
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked as the constructor's are."""
        super().add_param_group(param_group)
        try:
            check_group(param_group, len(self.param_groups) - 1, self.defaults)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # -- one step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Replace gradients by directions and let the base optimizer take its step.

        Args:
            closure: reevaluates the model and returns the loss; called once, before anything else.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        binding = self._bind()
        self._consolidated = {}
        if self._is_dry_step(binding):
            self._make_base_states_only()
        else:
            binding.precondition()
            self._base_step()
        return loss

    def _base_step(self) -> None:
        """The base optimizer's own step, on our groups and states."""
        self._base.param_groups = self.param_groups
        self._base.state = self.state
        if self._base_makes_state_early:
            self._make_base_state()
        self._base.step()

    def _make_base_state(self) -> None:
        """For a base that makes its states in the constructor: those of parameters that have none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state.get(parameter):
                    arguments = {name: group.get(name, value) for name, value in self._base_arguments.items()}
                    self.state[parameter] = type(self._base)([parameter], **arguments).state[parameter]

    def _is_dry_step(self, binding: Binding) -> bool:
        """Whether this is a framework's step with zero gradients, made so that the optimizer creates its states."""
        if not binding.matrices or any(matrix.step for matrix in binding.matrices):
            return False
        gradients = [hosts.local_tensor(p.grad) for _, p, _ in self._parameters() if p.grad is not None]
        in_earnest = any(self.state.values()) or any(bool(gradient.any()) for gradient in gradients)
        return not binding.ranks.any([in_earnest])[0]

    def _make_base_states_only(self) -> None:
        """A base step that changes no parameter and leaves the base's own step counts at zero."""
        still = {"lr": 0.0, "weight_decay": 0.0}
        kept = [{name: group[name] for name in still} for group in self.param_groups]
        for group in self.param_groups:
            group.update(still)
        try:
            self._base_step()
        finally:
            for group, values in zip(self.param_groups, kept, strict=True):
                group.update(values)
        for state in self.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0

    # -- which parameters are preconditioned ---------------------------------------------------------------------------

    def _parameters(self) -> Iterator[tuple[str, Tensor, PreconditionerOptions]]:
        """Name, tensor and options of every parameter, in the order of the groups."""
        for group_index, group in enumerate(self.param_groups):
            names = group.get("param_names")
            options = PreconditionerOptions.of_group(group)
            for index, parameter in enumerate(group["params"]):
                yield names[index] if names else f"parameter {index} of group {group_index}", parameter, options

    def _whole_shape(self, parameter: Tensor) -> torch.Size:
        location = self._locations.get(parameter)
        return location.shape if location else parameter.shape

    def _matrices(self) -> tuple[list[Tensor], list[Matrix]]:
        """The parameters to precondition and their fresh matrices, in the order of the groups."""
        parameters, matrices = [], []
        for name, parameter, options in self._parameters():
            shape = matrix_shape(self._whole_shape(parameter))
            if shape and options.precondition and (parameter.requires_grad or parameter.grad is not None):
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                parameters.append(parameter)
                matrices.append(Matrix(name, shape, options, parameter.device, dtype))
        return parameters, matrices

    def _bind(self) -> Binding:
        """Check this step's gradients, and give the binding of the parameters as they are now; collective."""
        if self._ranks is None:  # first of all: an error on one rank must reach the others
            self._ranks = Ranks(hosts.process_group([p for _, p, _ in self._parameters()]))
        ranks = self._ranks
        error: Exception | None = None
        parameters: list[Tensor] = []
        matrices: list[Matrix] = []
        try:
            for name, parameter, _ in self._parameters():
                _check_gradient(name, parameter.grad)
            parameters, matrices = self._matrices()
        except (TypeError, ValueError) as found:
            error = found
        stale = self._binding is None or not self._binding.fits(parameters, matrices)
        changed = self._binding is not None and not stale and self._binding.presence_changed()
        failed, any_stale, any_changed = ranks.any([error is not None, stale, changed])
        if failed:
            ranks.raise_together(error)
        if any_stale:
            self._rebind(ranks, parameters, matrices)
        assert self._binding is not None
        if any_stale or any_changed:
            self._binding.agree_on_presence()
        if any_stale and ranks.size > 1:
            self._binding.check_replicas()
        return self._binding

    def _rebind(self, ranks: Ranks, parameters: list[Tensor], matrices: list[Matrix]) -> None:
        """Bind parameters that have changed, and carry their factors over."""
        error: Exception | None = None
        candidates: list[Candidate] = []
        old = self._binding
        places = {parameter: index for index, parameter in enumerate(old.parameters)} if old else {}
        try:
            for parameter, matrix in zip(parameters, matrices, strict=True):
                if parameter in self._unbound:
                    self._unbound[parameter].check(matrix)
                elif old and parameter in places:
                    packing.check_same_bytes(old.matrices[places[parameter]], matrix)
                location = hosts.locate(matrix.name, parameter, self._locations)
                candidates.append(Candidate(parameter, matrix, Shard(location.start, location.stop, location.replica)))
        except ValueError as found:
            error = found
        ranks.raise_together(error)
        if not matrices and any(options.precondition for _, _, options in self._parameters()):
            warnings.warn("Shampoo4 has no matrix to precondition: only the base optimizer is at work", stacklevel=4)
        binding = Binding(ranks, candidates)
        kept = set(parameters)
        for parameter, place in places.items():
            if parameter not in kept:
                assert old is not None
                self._unbound[parameter] = packing.PackedState(old.matrices[place].options, old.pack(place))
        for index, parameter in enumerate(parameters):
            if parameter in self._unbound:
                binding.unpack(index, self._unbound.pop(parameter).full())
            elif old is not None and parameter in places:
                binding.unpack(index, old.pack(places[parameter]))
        self._binding = binding

    def _bind_locations(self, locations: Mapping[Tensor, hosts.Location]) -> None:
        """Be told where parameters live that cannot tell it themselves (FSDP1)."""
        self._locations = dict(locations)
        self._ranks = None

    # -- states --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's states and, for each preconditioned parameter, its factors as one uint8 vector.

        ``["state"][i]["preconditioner"]`` is a copy; the base's tensors are the live ones, as in torch. Everything
        loads with ``torch.load(weights_only=True)``.
        """
        packed = self._packed()
        data = [packed.get(parameter) for _, parameter, _ in self._parameters()]
        return packing.join(super().state_dict(), data)

    @torch.no_grad()
    def consolidate_state_dict(self) -> None:
        """Gather all factors on every rank, on the host, so that :meth:`state_dict` can be called on any of them.

        Collective. Needed before ``state_dict()`` where ranks hold whole parameters or flat ones (DDP, FSDP1): programs
        call it on one rank only there. Valid until the next step.
        """
        binding = self._binding
        if binding is not None and binding.ranks.size > 1:
            self._consolidated = {p: binding.pack(index).cpu() for index, p in enumerate(binding.parameters)}

    @torch.no_grad()
    def _packed(self) -> dict[Tensor, Tensor]:
        """Every preconditioner there is, as bytes; under FSDP2 and HSDP sharded as parameters are, and collective."""
        packed = {parameter: entry.data for parameter, entry in self._unbound.items()}
        binding = self._binding
        if binding is None:
            return packed
        if binding.ranks.size > 1 and not any(map(hosts.is_dtensor, binding.parameters)):
            if not self._consolidated and binding.parameters:
                raise RuntimeError(
                    "the factors of Shampoo4 are spread over ranks: call optimizer.consolidate_state_dict() on every "
                    "rank before state_dict()"
                )
            return {**packed, **self._consolidated}
        for index, parameter in enumerate(binding.parameters):
            packed[parameter] = hosts.shard_vector(binding.pack(index), parameter)
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave. Hyperparameters come from ``state_dict``, as in torch.

        Raises:
            ValueError: it was not written by this optimizer, or with options or shapes that store other bytes; nothing
                has been changed then.
        """
        packing.check_loadable(
            state_dict, self.param_groups, [(n, self._whole_shape(p)) for n, p, _ in self._parameters()]
        )
        plain, packed = packing.separate(state_dict)
        super().load_state_dict(plain)
        self._base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._binding, self._consolidated = None, {}
        self._unbound = {
            parameter: packing.PackedState(options, data.detach().clone())
            for (_, parameter, options), data in zip(self._parameters(), packed, strict=True)
            if data is not None
        }

    def __getstate__(self) -> dict[str, Any]:
        if self._binding is not None and self._binding.ranks.size > 1:
            raise RuntimeError("a Shampoo4 that is spread over ranks cannot be copied or pickled: use state_dict()")
        own = {name: getattr(self, name) for name in ("_base", "_base_arguments", "_base_makes_state_early")}
        options = {parameter: options for _, parameter, options in self._parameters()}
        packed = {p: packing.PackedState(options[p], data) for p, data in self._packed().items()}
        fresh: dict[str, Any] = {"_binding": None, "_ranks": None, "_locations": {}, "_consolidated": {}}
        return {**super().__getstate__(), **own, **fresh, "_unbound": packed}

    # -- reports -------------------------------------------------------------------------------------------------------

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the states on this rank, measured: ``{"preconditioner": int, "base": int}``."""
        preconditioner = sum(entry.data.numel() for entry in self._unbound.values())
        if self._binding is not None:
            preconditioner += self._binding.preconditioner.nbytes
        return {"preconditioner": preconditioner, "base": tensor_bytes(self.state.values())}

    def describe(self) -> str:
        """A table: each parameter, whether it is preconditioned or why not, its blocks, their owners and bytes.

        The owners are known once a step has been made, on several ranks.
        """
        owners = self._binding.owners() if self._binding is not None else {}
        alone = self._ranks is None or self._ranks.size == 1
        header = ("parameter", "shape", "preconditioned", "blocks", "owner", "bytes")
        described = [
            describe_parameter(
                name,
                self._whole_shape(p),
                p.requires_grad or p.grad is not None,
                options,
                "0" if alone else owners.get(p, "?"),
            )
            for name, p, options in self._parameters()
        ]
        total = ("all", "", "", "", "", format_bytes(sum(size for _, size in described)))
        return table([header, *(row for row, _ in described), total])


def _check_gradient(name: str, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        raise TypeError(f"the gradient of {name} is sparse ({gradient.layout}): Shampoo4 needs dense gradients")
    if not gradient.is_floating_point():
        raise TypeError(f"the gradient of {name} is of type {gradient.dtype}: Shampoo4 needs real floating-point ones")
