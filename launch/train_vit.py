"""Train a vision transformer with Shampoo4, or with an optimizer to compare it with.

    python launch/train_vit.py                                   # scikit-learn's digits, nothing to download
    python launch/train_vit.py --dataset_name fashion-mnist --optimizer adamw --output_dir runs/adamw

The same file runs in one process and in many (``accelerate launch launch/train_vit.py ...``). All decisions follow from
the options and the step count, which all processes share. README.md explains the options.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accelerate.logging import get_logger
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm.auto import tqdm
from vit.args import Arguments, parse_args
from vit.augment import BatchTransform
from vit.data import Images, Plan, make_loaders, mixed_seed, natural_channels, normalization
from vit.host import check_accumulation, choose_fsdp_units, make_accelerator
from vit.model import build_config, build_model, side
from vit.optim import build_optimizer, estimated_bytes, state_bytes
from vit.progress import Checkpoints, Progress, StopSignals
from vit.report import MetricsLog, peak_memory_bytes, plot_curves, plot_health, print_tables, title
from vit.sources import load_image_data

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.rehearsal import (
    adjust_deepspeed,
    check_distribution,
    describe_distribution,
    full_state_dict,
    inner_optimizer,
    whole_models,
)

logger = get_logger("train_vit")


class Run:
    """One training: its model, data and optimizer, the loop, and the files that it writes."""

    def __init__(self, args: Arguments) -> None:
        self.options, self.args = args, args.training
        self.output_dir = Path(self.args.output_dir)
        self.started = time.perf_counter()
        self.accelerator = make_accelerator(self.args)
        set_seed(self.args.seed)  # the model starts alike on every process
        config = self._load_data(args)
        self._build_model(args, config)
        self.progress = Progress()
        self.losses: list[Tensor] = []  # on the device until they are logged, so that no step waits for them
        self.accelerator.register_for_checkpointing(self.scheduler, self.progress)
        noted = {**args.flat(), "step_images": self.plan.step_images, "epoch_steps": self.plan.epoch_steps}
        self.checkpoints = Checkpoints(self.accelerator, self.output_dir, self.args.checkpoints_total_limit, noted)
        self.signals = StopSignals(timedelta(seconds=self.args.ddp_timeout))
        self.log: MetricsLog | None = None
        self.health_log: MetricsLog | None = None
        self.saved_step = -1

    def _load_data(self, args: Arguments) -> transformers.PretrainedConfig:
        """Prepare images and loaders. Return the configuration of the model."""
        try:
            with self.accelerator.main_process_first():  # the others read what the first one has downloaded
                data = load_image_data(args.data)
            config = build_config(args.model, data.label_names, natural_channels(data))
        except (OSError, ValueError) as error:  # of a wrong option, of which a traceback would tell no more
            raise SystemExit(f"train_vit.py: error: {error}") from error
        shape = side(config.image_size), config.num_channels
        train, evaluation = (
            Images(rows, data, *shape, args.data.cache_images_gb * 1e9) for rows in (data.train, data.validation)
        )
        self.transform = BatchTransform(
            *normalization(args, train),
            image_size=shape[0],
            num_labels=len(data.label_names),
            augment=args.data.augment,
            crop_padding=args.data.crop_padding,
            mixup=args.data.mixup,
        ).to(self.accelerator.device)
        self.images = (len(train), len(evaluation))
        self.train_loader, self.eval_loader, self.sampler = make_loaders(args, train, evaluation)
        self.plan = Plan.make(self.args, len(train), self.accelerator.num_processes)
        return config

    def _build_model(self, args: Arguments, config: transformers.PretrainedConfig) -> None:
        """Make model, optimizer and schedule, and hand them to Accelerate."""
        with whole_models(self.accelerator):
            model = build_model(args.model, config)
        # ds_shape: DeepSpeed may have partitioned the model while it was made.
        self.shapes = [(name, getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()]
        self.deepspeed_optimizer = None
        if adjust_deepspeed(self.accelerator, gradient_clipping=self.args.max_grad_norm):
            logger.info("DeepSpeed's configuration names the optimizer; --optimizer and its options have no effect")
            self.deepspeed_optimizer = self.accelerator.deepspeed_plugin.deepspeed_config["optimizer"]
        optimizer = build_optimizer(args, model, self.plan.total_steps, self.deepspeed_optimizer)
        choose_fsdp_units(self.accelerator, model)
        self.model, self.optimizer, self.train_loader, self.eval_loader = self.accelerator.prepare(
            model, optimizer, self.train_loader, self.eval_loader
        )
        check_distribution(self.accelerator, self.model, optimizer)
        check_accumulation(self.accelerator, self.args.gradient_accumulation_steps)
        self.inner_optimizer = inner_optimizer(self.accelerator, self.model, self.optimizer)
        self.input_dtype = next(self.model.parameters()).dtype  # not float32 where DeepSpeed trains in bf16 or fp16
        self.host = describe_distribution(self.accelerator, self.model)
        warmup = self.args.num_warmup_steps
        # Not prepared: Accelerate would step it once per process and so run through the schedule too fast.
        self.scheduler = transformers.get_scheduler(
            self.args.lr_scheduler_type,
            self.inner_optimizer,
            num_warmup_steps=math.ceil(self.args.warmup_ratio * self.plan.total_steps) if warmup is None else warmup,
            num_training_steps=self.plan.total_steps,
        )

    def train(self) -> None:
        """Train to the last step, evaluating after every epoch."""
        self._begin()
        plan, progress = self.plan, self.progress
        silent = not self.accelerator.is_local_main_process
        bar = tqdm(total=plan.total_steps, initial=progress.step, disable=silent, desc="training")
        self.lap_started, self.lap_step = time.perf_counter(), progress.step
        for epoch in range(progress.step // plan.epoch_steps, plan.epochs):
            first_step, last_step = epoch * plan.epoch_steps, plan.last_step(epoch)
            if progress.step >= last_step:  # resumed a run that had ended
                break
            if progress.step == first_step:
                progress.epoch_losses = []
            # Positions in the epoch's order: a resumed epoch goes on where it stopped; the last epoch may be cut short.
            self.sampler.start(epoch, *((step - first_step) * plan.step_images for step in (progress.step, last_step)))
            self.model.train()
            self.transform.train()
            for number, batch in enumerate(self.train_loader):
                self._micro_batch(batch, number)
                if not self.accelerator.sync_gradients:
                    continue
                bar.update()
                if progress.step < last_step:  # the epoch's last step waits for the evaluation
                    self._save_if_due()
                    self._stop_if_asked()
            if progress.step != last_step:
                raise RuntimeError(f"epoch {epoch} ended at step {progress.step} instead of {last_step}")
            with self._off_the_clock():
                self.evaluate()
            self._save_if_due(epoch_ends=True)
            if progress.step < plan.total_steps:
                self._stop_if_asked()
        bar.close()

    def _micro_batch(self, batch: dict[str, Tensor], number: int) -> None:
        """Run forward and backward on one batch; after the last batch of a step, take the step."""
        accelerator = self.accelerator
        # The random numbers of a batch (augmentation, dropout) depend on the seed, the step and the process only, so a
        # resumed run draws the same ones without a saved generator.
        part = number % self.args.gradient_accumulation_steps
        torch.manual_seed(mixed_seed(self.args.seed, self.progress.step, part, accelerator.process_index))
        images, targets = self.transform(batch)
        with accelerator.accumulate(self.model):
            logits = self.model(pixel_values=images.to(self.input_dtype)).logits.float()
            loss = F.cross_entropy(logits, targets, label_smoothing=self.args.label_smoothing)
            accelerator.backward(loss)
            self.losses.append(loss.detach())
            norm = None
            if accelerator.sync_gradients and self.args.max_grad_norm > 0:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self._after_step(norm)

    def _after_step(self, norm: Tensor | float | None) -> None:
        rate = self.scheduler.get_last_lr()[0]  # of the step just taken
        if not self.optimizer.step_was_skipped:  # fp16 skips steps whose gradients overflow
            self.scheduler.step()
        self.progress.step += 1
        if self.progress.step % self.args.logging_steps == 0 or self.progress.step == self.plan.total_steps:
            self._log_step(rate, norm)

    def _log_step(self, rate: float, norm: Tensor | float | None) -> None:
        progress = self.progress
        self._collect_losses()
        if isinstance(norm, Tensor):
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        seconds = time.perf_counter() - self.lap_started
        steps = progress.step - self.lap_step
        self._write(
            {
                "loss": math.fsum(progress.unlogged_losses) / len(progress.unlogged_losses),
                "learning_rate": rate,
                "grad_norm": norm,
                "images_per_second": steps * self.plan.step_images / seconds,
                "step_seconds": seconds / steps,
                "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
                "optimizer_state_bytes": sum(state_bytes(self.inner_optimizer).values()),
            }
        )
        progress.unlogged_losses = []
        self.lap_started, self.lap_step = time.perf_counter(), progress.step

    def _collect_losses(self) -> None:
        self.progress.collect(self.losses, self.args.gradient_accumulation_steps, self.accelerator)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure accuracy and loss on the evaluation images. Each image counts once on any number of processes."""
        self._collect_losses()
        self.model.eval()
        self.transform.eval()
        correct, total_loss, count = 0, 0.0, 0
        for batch in self.eval_loader:
            images, labels = self.transform(batch)
            logits = self.model(pixel_values=images.to(self.input_dtype)).logits.float()
            judged = (logits.argmax(-1) == labels, F.cross_entropy(logits, labels, reduction="none"))
            hits, losses = self.accelerator.gather_for_metrics(judged)
            correct += int(hits.sum())
            total_loss += float(losses.cpu().double().sum())
            count += len(losses)
        accuracy = correct / count
        self.progress.evaluation = {"eval_accuracy": accuracy, "eval_loss": total_loss / count}
        self.progress.best_accuracy = max(self.progress.best_accuracy, accuracy)
        self._write(self.progress.evaluation)
        if self.args.log_health and isinstance(self.inner_optimizer, Shampoo4):
            health = self.inner_optimizer.health()
            if self.health_log is not None:
                self.health_log.write({"step": self.progress.step, "health": health})

    def finish(self) -> None:
        """Save the model and the results, draw the curves, print the tables."""
        self.signals.end()
        self._save_model()
        held = gather_object([state_bytes(self.inner_optimizer)])
        if self.accelerator.is_main_process:
            results = self._results(held)
            (self.output_dir / "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
            assert self.log is not None
            plot_curves(self.log.read(), self.output_dir / "curves.png", title(results))
            if self.health_log is not None:
                plot_health(self.health_log.read(), self.output_dir / "health.png", title(results))
            print_tables(results)
            for name, path in (("results", "all_results.json"), ("curves", "curves.png"), ("model", "model")):
                print(f"{name:8}{self.output_dir / path}")
        self.accelerator.wait_for_everyone()  # the main process has written files
        self._end()

    def _end(self) -> None:
        # The model must go before the process group. A DDP model that is freed later destroys the group under Python's
        # lock, for which gloo's threads may then wait forever.
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)
        self.accelerator.end_training()

    def _begin(self) -> None:
        """Resume if asked, open the logs, and log the plan of the run."""
        args, plan, accelerator = self.args, self.plan, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.checkpoints.begin(args.resume_from_checkpoint, args.overwrite_output_dir)
        if accelerator.is_main_process:
            self.checkpoints.remove_results()
            self.log = MetricsLog(self.output_dir / "metrics.jsonl", resumed_at=self.progress.step)
            if args.log_health:
                self.health_log = MetricsLog(self.output_dir / "health.jsonl", resumed_at=self.progress.step)
        if args.with_tracking:
            plain = {k: v for k, v in self.options.flat().items() if isinstance(v, (int, float, str, bool))}
            accelerator.init_trackers("tensorboard", plain)
        logger.info("***** Running training *****")
        for name, value in (
            ("images to train on, to evaluate on", self.images),
            ("epochs", plan.epochs),
            ("images per process and batch", args.per_device_train_batch_size),
            ("batches per step", args.gradient_accumulation_steps),
            ("running as", f"{self.host}, {accelerator.device.type}"),
            ("images per step", plan.step_images),
            ("steps", plan.total_steps),
            ("steps done", self.progress.step),
        ):
            logger.info(f"  {name}: {value}")
        self.seconds_before = self.progress.seconds

    def _save_if_due(self, epoch_ends: bool = False) -> None:
        every = self.args.checkpointing_steps
        if every is not None and (epoch_ends if every == "epoch" else self.progress.step % int(every) == 0):
            self._save()

    def _stop_if_asked(self) -> None:
        """Save and exit with status 75 after SIGTERM or SIGUSR1 to any process."""
        if not self.signals.stop_now():
            return
        if self.saved_step != self.progress.step:
            self._save()
        logger.warning(
            f"asked to stop: saved after step {self.progress.step}; --resume_from_checkpoint latest goes on from there"
        )
        self._end()
        sys.exit(StopSignals.EXIT_STATUS)

    def _save(self) -> None:
        with self._off_the_clock():
            self._collect_losses()  # raises for a loss that is not finite, before anything is saved
            self.progress.seconds = self._seconds()
            self.checkpoints.save(self.progress.step)
            self.saved_step = self.progress.step

    def _save_model(self) -> None:
        """Save the model in the form of transformers, with the normalization of its images."""
        state = full_state_dict(self.accelerator, self.model)  # every process takes part
        folder, main = self.output_dir / "model", self.accelerator.is_main_process
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, is_main_process=main, save_function=self.accelerator.save, state_dict=state)
        if main:
            (folder / "preprocessor_config.json").write_text(json.dumps(self.transform.as_processor(), indent=2) + "\n")

    def _results(self, held: list[dict[str, int]]) -> dict[str, Any]:
        progress, processes = self.progress, self.accelerator.num_processes
        group = self.inner_optimizer.param_groups[0]
        return {
            "train_loss": math.fsum(progress.epoch_losses) / len(progress.epoch_losses),
            **progress.evaluation,
            "best_eval_accuracy": progress.best_accuracy,
            "steps": progress.step,
            "epochs": round(progress.step / self.plan.epoch_steps, 3),
            "total_seconds": self._seconds(),
            "parameters": sum(shape.numel() for _, shape in self.shapes),
            "train_images": self.images[0],
            "eval_images": self.images[1],
            "processes": processes,
            "host": self.host,
            "mixed_precision": self.accelerator.mixed_precision,
            "deepspeed_optimizer": self.deepspeed_optimizer,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "state_bytes": {key: max(rank[key] for rank in held) for key in ("preconditioner", "base")},
            "state_bytes_per_process": held,
            "estimated_state_bytes": estimated_bytes(self.options, self.shapes, self.host, processes),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "options": self.options.flat(),
            "optimizer_options": {k: v for k, v in group.items() if k not in ("params", "param_names")},
        }

    def _write(self, values: dict[str, Any]) -> None:
        """Write a line to the log and to the tracker."""
        step = self.progress.step
        if self.log is not None:
            self.log.write({"step": step, "epoch": round(step / self.plan.epoch_steps, 4), **values})
        if self.args.with_tracking:
            self.accelerator.log({k: v for k, v in values.items() if v is not None}, step=step)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Leave the time of the block out of the time per step."""
        begun = time.perf_counter()
        yield
        self.lap_started += time.perf_counter() - begun


def main(argv: Sequence[str] | None = None) -> None:
    """Run the training that the command line describes."""
    run = Run(parse_args(argv))
    run.train()
    run.finish()


if __name__ == "__main__":
    main()
