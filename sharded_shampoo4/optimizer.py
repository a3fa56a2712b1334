"""The optimizer: SOAP and Shampoo in low bits, beside any elementwise torch optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from . import report
from .advice import Advice
from .base import Base
from .base_options import check_group, expand_preset
from .context import own_arithmetic
from .distributor import Distributor
from .hosts import Host, saving_advice
from .joining import Joinable, notify
from .members import Members
from .options import (
    Bits,
    CodeBook,
    GraftingScope,
    LowDtype,
    MatmulDtype,
    Method,
    MomentDtype,
    PreconditionerOptions,
    Preset,
    Quantize,
    Refresh,
    RefreshDtype,
    RefreshIterations,
    Root,
    ScaleDtype,
    SecondMomentDtype,
    Split,
)
from .placeholders import is_nonzero
from .placement import check_process_group
from .presets import PRESETS, takes_preset
from .saving import SavedStates
from .session import Session
from .state_dict import FORMAT_VERSION, VERSION_KEY
from .tensors import tensor_bytes


class Shampoo4(SavedStates):
    """SOAP and Shampoo with eigenbases in 8, 4 or 3 bits, their states and matrix work shared out over all ranks.

    Every parameter with a matrix view (size-1 dimensions dropped, reshaped to (first, rest), rank 2) is cut into
    blocks. L and R are running averages of G G^T and G^T G of a block's gradients G, kept as eigenvalues and quantized
    eigenbases V_L and V_R. A step writes the block's direction over its gradient: **p.grad is overwritten**.

    With method="soap" (SOAP, Vyas et al., arXiv 2409.11321) the direction is V_L X V_R^T, where X is what Adam with
    Nesterov's momentum makes of V_L^T G V_R, and the parameter moves along it: W <- (1 - lr weight_decay) W - lr
    direction. Try 2, 4 and 8 times AdamW's learning rate. Statistics are absorbed in the first step and in
    every step t, counted from 1, with ``t % statistics_interval == 0``.

    With method="shampoo" (4-bit Shampoo, Wang et al., NeurIPS 2024) the direction is L^(-1/4) G R^(-1/4), grafted to
    the gradient's norm, which the base optimizer takes for the gradient. Statistics are absorbed if ``t %
    statistics_interval == 0``, then inverse roots are recomputed if ``t % root_interval == 0``. Before the first root
    the direction is the gradient. Both intervals begin short, unless ``interval_warmup=False``: the first root is that
    of step 10. Other defaults hold: bits=4, scale_dtype="float32", shampoo_beta=0.95, rectify_steps=(1, 2),
    max_preconditioner_dim=1024, root_interval=500 and statistics_interval=100.

    Parameters without a matrix view are the base optimizer's: AdamW trains them as ``torch.optim.AdamW`` does.

    Args:
        params: Tensors, parameter groups, or ``model.named_parameters()``, whose names then stand in messages, tell
            stacks of experts and their biases (``batch_dims``), and go into states. A group may give every option below
            itself, except ``base``, ``total_steps`` and ``process_group``.
        lr: Learning rate of all parameters. (default: 1e-3)
        base: ``"adamw"``, ``"sgd"``, ``"adagrad"``, or an elementwise torch optimizer class. Low-bit ones are among
            them, such as torchao's ``AdamW8bit`` and ``AdamW4bit`` and bitsandbytes' ``AdamW8bit``. They round their
            states in blocks that begin where a rank's shard does: training is then the same on any number of ranks but
            for that rounding, not bitwise. bitsandbytes' do not take FSDP2's DTensors, nor portable checkpoints.
            (default: "adamw")
        weight_decay: Weight decay of all parameters; decoupled for matrices. (default: 0.0)
        preset: Options to begin with: "compact", the smallest state, with eigenbases in 4 bits; the "paper"'s, with
            method="shampoo"; "shampoo-compact", the smallest state with that method. An option that is given beside it
            wins. One of "paper", "compact", "shampoo-compact". A group's preset overrides the options of the call, and
            other options of the group override its preset. (default: None)
        precondition: Precondition the parameters; False leaves them to the base optimizer alone. (default: True)
        method: The update rule. "soap" is Adam in the coordinates of the eigenbases; the base optimizer keeps nothing
            of a preconditioned parameter. "shampoo" multiplies gradients by inverse roots, as the paper of 4-bit
            Shampoo does, and the base optimizer takes the result for a gradient. One of "shampoo", "soap". (default:
            "soap")
        bits: Bits per element of the eigenbases: 3, 4 or 8; 32 stores them in float32, and with method="shampoo" the
            statistics L and R themselves. With 3 or 4 bits rectify_steps is (1, 1) and protect is True, unless given.
            One of 3, 4, 8, 32. (default: 8)
        quantize: What is quantized: the eigenbases of L and R, or with "preconditioner" L and R, the paper's naive
            baseline. One of "eigenbasis", "preconditioner". (default: "eigenbasis")
        codebook: Levels that values are rounded to, zero among them; "normal" has the best levels for Gaussian values,
            with scales of least squared error. One of "linear2", "dynamic_tree", "normal". (default: "linear2")
        quant_block_size: Elements that share one scale. (default: 64)
        scale_dtype: Type of the stored scales. One of "float32", "bfloat16". (default: "bfloat16")
        root: Inverse roots are stored. In a step that also renews the eigenbasis they are computed before it is
            quantized; with "rectified" always from the stored eigenbasis, as in the paper. "implicit" stores none:
            every step computes directions from the rectified eigenbases. One of "stored", "rectified", "implicit".
            (default: "stored")
        protect: Keep one in sixteen eigenvectors, those of the largest eigenvalues, in 8 bits, and the others, in 3 or
            4 bits, orthogonal to them. (default: False)
        min_quant_numel: Least elements of a factor that is quantized; smaller ones stay in float32. (default: 4096)
        shampoo_beta: Decay of the statistics' running average, in [0, 1), per statistics update. (default: 0.9)
        matrix_eps: Initial statistics, and ridge of the inverse roots relative to the largest eigenvalue. (default:
            1e-6)
        statistics_interval: Steps between statistics updates (T1), which also renew the eigenbases. (default: 5)
        root_interval: With method="shampoo": steps between inverse roots (T2). (default: 500)
        interval_warmup: Begin with short intervals that double until they are as long as asked for: statistics in step
            5, inverse roots in steps 10, 20, 40 and so on. False keeps the intervals from the first step, as in the
            paper: the base optimizer then works alone until step root_interval. (default: True)
        total_steps: Length of the training, if it is known. With method="shampoo" an interval that is not given is then
            a hundredth of it for inverse roots, but at least 50 and at most 500 steps, and a fifth of that for
            statistics; intervals that are too long for it are warned of. (default: None)
        refresh: Refresh all factors in the same steps, as in the paper, or "staggered": each in its own steps, at the
            same intervals, so that all steps take about as long. One of "together", "staggered". (default: "together")
        rectify_steps: Steps of Björck's iteration on a dequantized eigenbasis, before a statistics update and before a
            root. (default: (0, 0))
        refresh_iterations: QR steps of a statistics update. One of 1, 2. (default: 1)
        refresh_dtype: Arithmetic of statistics updates and inverse roots. One of "float64", "float32". (default:
            "float32")
        max_preconditioner_dim: Most rows or columns of a block. (default: 256)
        split: Cut a long side into parts of about equal size, in multiples of 64 where there is room; with "even" of
            sizes that differ by at most 1; with "remainder" into full parts and a rest. One of "aligned", "even",
            "remainder". (default: "aligned")
        max_aspect: A side of a matrix more than this many times as long as the other has no factors: the matrix is
            preconditioned on the other side only. Four times as many in matrices of fewer than 4096 elements. 0 gives
            every side factors. (default: 7)
        batch_dims: Leading dimensions that count matrices, each of which has its own factors: 1 for experts of shape
            [experts, rows, columns]. -1 finds stacks by their shape, and leaves stacked biases to the base optimizer.
            (default: -1)
        split_rows: Cut the rows of a matrix, such as a fused projection, into parts with their own factors: one number
            is how many equal parts, several are their sizes. (default: ())
        grafting: Whose gradient norm a direction takes: the matrix's, the block's, or none. One of "parameter",
            "block", "none". (default: "parameter")
        soap_betas: With method="soap": decay of momentum and second moment, each in [0, 1), per step. (default: (0.9,
            0.95))
        soap_eps: With method="soap": what is added to the root of the second moment. (default: 1e-8)
        newton_schulz_steps: With method="soap": steps of Muon's iteration that bring a direction's singular values
            close to 1; 5 are usual. (default: 0)
        momentum_dtype: With method="soap": how the momentum is stored; "int8" is 8 bits with a scale for each block.
            One of "float32", "bfloat16", "int8". (default: "bfloat16")
        second_moment_dtype: With method="soap": how the second moment is stored; "factored" keeps the means of its rows
            and columns. One of "float32", "bfloat16", "int8", "factored". (default: "bfloat16")
        max_failures: Failed updates of a factor in a row before step() raises. A failed update, one with numbers that
            are not finite, leaves the factor as it was. (default: 10)
        matmul_dtype: Type of the matrix products that make a direction; stored states do not depend on it. "tf32" is
            float32 with products in TF32, for CUDA devices that have it. One of "float32", "tf32", "bfloat16".
            (default: "float32")
        exchange_dtype: Type in which gradients and directions travel between ranks. "bfloat16" halves the traffic, and
            rounds also what need not travel, so that training is the same on any number of ranks. One of "float32",
            "bfloat16". (default: "float32")
        scratch_mib: Memory in MiB that a step may take for dequantized matrices and messages; a single block may need
            more. 0 stands for 256 on a CPU and 2048 on an accelerator, which needs larger batches. (default: 0)
        process_group: Ranks that hold these parameters between them. None finds them from the parameters: all ranks, or
            those of an FSDP2 mesh. A ``torch.distributed`` group is for DDP on some of the ranks, a pipeline stage, or
            one of several models; ``"alone"`` for a process that trains its parameters by itself, without any
            collective. No state_dict has it. (default: None)
        **base_options: Further options of the base optimizer, such as ``betas`` or ``momentum``.

    Values may stand as configuration files write them, such as ``"1e-3"`` or ``"(0.9, 0.99)"``. A warning names
    parameters whose factors cost much more than they do, and those that look like stacks of matrices.

    Raises:
        TypeError: an option that is neither ours nor the base optimizer's, or a parameter that is no tensor.
        ValueError: an option's value that makes no sense.
    """

    @takes_preset
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        base: str | type[Optimizer] = "adamw",
        weight_decay: float = 0.0,
        preset: Preset | None = None,
        precondition: bool = True,
        method: Method = "soap",
        bits: Bits = 8,
        quantize: Quantize = "eigenbasis",
        codebook: CodeBook = "linear2",
        quant_block_size: int = 64,
        scale_dtype: ScaleDtype = "bfloat16",
        root: Root = "stored",
        protect: bool = False,
        min_quant_numel: int = 4096,
        shampoo_beta: float = 0.9,
        matrix_eps: float = 1e-6,
        statistics_interval: int | None = None,
        root_interval: int | None = None,
        interval_warmup: bool = True,
        total_steps: int | None = None,
        refresh: Refresh = "together",
        rectify_steps: tuple[int, int] = (0, 0),
        refresh_iterations: RefreshIterations = 1,
        refresh_dtype: RefreshDtype = "float32",
        max_preconditioner_dim: int = 256,
        max_aspect: int = 7,
        split: Split = "aligned",
        batch_dims: int = -1,
        split_rows: tuple[int, ...] = (),
        grafting: GraftingScope = "parameter",
        soap_betas: tuple[float, float] = (0.9, 0.95),
        soap_eps: float = 1e-8,
        newton_schulz_steps: int = 0,
        momentum_dtype: MomentDtype = "bfloat16",
        second_moment_dtype: SecondMomentDtype = "bfloat16",
        max_failures: int = 10,
        matmul_dtype: MatmulDtype = "float32",
        exchange_dtype: LowDtype = "float32",
        scratch_mib: int = 0,
        process_group: dist.ProcessGroup | Literal["alone"] | None = None,
        **base_options: Any,
    ) -> None:
        options = PreconditionerOptions.of_call(locals())
        check_process_group(process_group)
        self._process_group = process_group
        Joinable.__init__(self)
        self.base = Base(base, lr, weight_decay, base_options)
        lr, weight_decay = self.base.arguments["lr"], self.base.arguments.get("weight_decay", 0.0)
        self._members = Members()
        self._advice: Advice | None = None  # given for all groups at once
        self._session = Session(self._members, self.base.name, process_group)
        self._consolidated: dict[Tensor, Tensor] | None = None  # all factors, until the next step
        defaults = {"lr": lr, "weight_decay": weight_decay, **self.base.defaults, **options.as_group()}
        super().__init__(params, {**defaults, VERSION_KEY: FORMAT_VERSION})
        self._advice = Advice(total_steps)
        self._advise()

    @staticmethod
    def paper_settings() -> dict[str, Any]:
        """Return the options of 4-bit Shampoo as published: ``Shampoo4(params, **Shampoo4.paper_settings())``."""
        return dict(PRESETS["paper"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked as the constructor's are."""
        if "process_group" in param_group:
            raise TypeError(
                "process_group belongs to the whole optimizer, not to a param group: make one for each group"
            )
        if "total_steps" in param_group:
            raise TypeError("total_steps is of the whole optimizer: give a param group root_interval instead")
        if "base" in param_group:
            raise TypeError(
                "base belongs to the whole optimizer, not to a param group: make one for each base, or give the group "
                "precondition=False"
            )
        given = set(param_group)
        expand_preset(param_group, len(self.param_groups), self.defaults["method"])
        super().add_param_group(param_group)
        try:
            check_group(param_group, len(self.param_groups) - 1, given, self.base)
            self._members.add(param_group)
            self._advise()
        except Exception:
            self._members.remove(self.param_groups.pop())
            raise

    def _advise(self) -> None:
        if self._advice is not None:
            self._advice.give(self._members.trained())

    def warn_if_short(self, total_steps: int) -> None:
        """Warn if a training of ``total_steps`` is so short that most of it would be the base optimizer's alone."""
        if self._advice is not None:
            self._advice.total_steps = total_steps
            self._advise()

    # -- one step ------------------------------------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Replace gradients by directions and let the base optimizer take its step.

        What Shampoo4 itself raises is raised on every rank alike, before any parameter has changed.

        Args:
            closure: reevaluates the model and returns the loss; called once, before anything else.

        Raises:
            RuntimeError: no parameter has a gradient, gradients of copies differ, ranks make different calls, or
                ``max_failures`` updates of a factor have failed.
            TypeError: a gradient that is sparse or complex.
            ValueError: parameters that have changed, or that this host cannot train, or not the same on all ranks.
        """
        notify(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with own_arithmetic():
            distributor = self._session.current(self.param_groups, self.state, self)
            updates = self._session.updates
            self._consolidated = None
            if self._is_dry_step(distributor):
                self.host.check_state_dict()
                with updates.left_to_base(self.param_groups, self.state):
                    self.base.make_states(self.param_groups, self.state)
            else:
                distributor.precondition()
                # The base first: it may refuse what it is given.
                with self._together_at_first(distributor), updates.left_to_base(self.param_groups, self.state):
                    self.base.step(self.param_groups, self.state)
                with self._together_at_first(distributor):
                    updates.step_along(self.param_groups)
                distributor.has_stepped = True
            self._session.mark_stepped(self.state)
        return loss

    @contextlib.contextmanager
    def _together_at_first(self, distributor: Distributor) -> Iterator[None]:
        """Raise on every rank what a part of the first step raises on one: the base takes memory for its states.

        Warnings that depend on the framework are given here too: they may be errors.
        """
        if distributor.has_stepped:
            yield
            return
        with distributor.ranks.together():
            self._take_length_of_host()
            self._warn_of_saving()
            yield

    def _take_length_of_host(self) -> None:
        total_steps = self.host.total_steps
        if total_steps is not None and self._advice is not None and self._advice.total_steps is None:
            self.warn_if_short(total_steps)

    def _warn_of_saving(self) -> None:
        ranks = self._session.ranks
        if self._saving_is_arranged or not self._session.spread or ranks is None or ranks.rank != 0:
            return
        if advice := saving_advice(self):
            self._saving_is_arranged = True  # say it once
            report.warn(advice)

    def _is_dry_step(self, distributor: Distributor) -> bool:
        """Whether this is a framework's step with zero gradients, made so that the optimizer creates its states."""
        if not distributor.matrices or any(matrix.step for matrix in distributor.matrices) or self._members.partitioned:
            return False
        with distributor.ranks.together():
            entries = self._members.entries(self.param_groups)
            in_earnest = any(self.state.values()) or any(is_nonzero(e.name, e.holder.grad) for e in entries)
        return not distributor.ranks.any([in_earnest])[0]

    @property
    def process_group(self) -> dist.ProcessGroup | Literal["alone"] | None:
        """The ranks that were given to the constructor."""
        chosen: dist.ProcessGroup | Literal["alone"] | None = self._process_group
        return chosen

    def use_host(self, host: Host) -> None:
        """Be told by a framework's adapter where parameters lie that cannot tell it themselves (FSDP1)."""
        self._session.use_host(host)
        self._advise()

    def _take_names(self, model: torch.nn.Module, anew: bool) -> None:
        """Take names that are missing from ``model``, or all of them ``anew``.

        Raises:
            ValueError: the parameters still have no names of their own.
        """
        self._members.follow(self.param_groups)
        self._members.name_by(model, anew)
        self._members.plain_names()

    # -- reports -------------------------------------------------------------------------------------------------------

    def state_bytes(self) -> dict[str, int]:
        """Measure the bytes of the states on this rank: ``{"preconditioner": int, "base": int}``."""
        return {"preconditioner": self._session.nbytes, "base": tensor_bytes(self.state.values())}

    def traffic_bytes(self) -> int:
        """Count the bytes of gradients and directions that this rank has sent to other ranks so far.

        Returns:
            int: bytes of all steps since this optimizer was made; 0 in one process. What ranks agree on besides (flags,
            and 16 bytes a block for the norms of grafting) is not counted. ``estimate_memory(...).traffic`` predicts
            how many an ordinary step adds.
        """
        return 0 if self._session.ranks is None else self._session.ranks.bytes_sent

    @own_arithmetic()
    def health(self) -> dict[str, dict[str, float]]:
        """Measure the factors of each preconditioned parameter, by its name; collective, and not for every step.

        ``orthogonality_error``: of the worst eigenbasis V, ||V^T V - I||_F / sqrt(order), as it is stored;
        ``rectified_error``: the same as it is used, after rectification (both NaN where no eigenbasis is stored);
        ``smallest_eigenvalue`` and ``largest_eigenvalue`` of the statistics; ``failures``: the most failed updates in a
        row of any factor; ``bytes`` of all its factors; ``steps`` that it has taken, and the ``roots`` that have been
        computed in them: as long as there are none, the base optimizer works on plain gradients. Empty before the first
        step.
        """
        return report.health(self._session)

    def describe(self) -> str:
        """Write a table: each parameter, whether it is preconditioned or why not, its blocks, their owners and bytes.

        The owners are known once a step has been made, on several ranks. The last line says when preconditioning
        begins, or how far it has come.
        """
        return report.describe(self._session, self.param_groups)
