"""The training loop of learned compressors: plain, on accelerate, and able to go on exactly after a kill."""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType

from longfit.compressors.soft import LearnedCompressor
from longfit.errors import InputError, TrainingError
from longfit.loading import load
from longfit.training import checkpoint, setup
from longfit.training.batches import Batch, Batches
from longfit.training.data import sources
from longfit.training.files import keep_lines, write_whole
from longfit.training.frozen import check_frozen, frozen_hashes
from longfit.training.metrics import LOG, Metrics, check_trackers
from longfit.training.outcome import ADAPTER, final_table, in_short, save_adapter, small_table, whole_compressor
from longfit.training.recipe import Recipe
from longfit.training.report import write_curves, write_table
from longfit.training.scaling import Scaling
from longfit.training.schedules import learning_rate, linear, stepwise
from longfit.training.student import Student

Hook = Callable[[int, LearnedCompressor], dict[str, Any]]
CHECKPOINTS, PARTS = "checkpoints", "evaluation-parts.jsonl"


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
        folder: of the run; adapter: the trained weights in it.
        steps: done in all; seconds: of training in all.
        stopped: "steps" or "time".
        losses: of the last step.
        table: of the evaluation at the end; see `evaluate.evaluate`.
    """

    folder: Path
    adapter: Path
    steps: int
    seconds: float
    stopped: str
    losses: dict[str, float]
    table: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"folder": str(self.folder), "adapter": str(self.adapter)}


def run(
    recipe: "str | Path | dict[str, Any] | Recipe",
    output: str | Path | None = None,
    *,
    data: str | Path | None = None,
    loaded: tuple[Any, Any] | None = None,
    hooks: Sequence[tuple[int, Hook]] = (),
    quiet: bool = False,
) -> Trained:
    """Train what a recipe says; started again with the same folder, it goes on.

    Args:
        output: the run's folder; runs/<name of the recipe> where None.
        data: the data folder.
        loaded: a model and its tokenizer, in place of loading the recipe's.
        hooks: `(every, hook)`: after every so many steps the hook gets the step and the compressor, and what it
            returns goes to metrics.jsonl.
        quiet: no progress bar.

    Raises:
        InputError: a recipe that cannot be, or a folder with another recipe's run.
        DataError, OverlapError: data that are missing, broken, empty, or in training and in evaluation.
        TrainingError: a loss that is no number, damaged checkpoints, a frozen weight that moved.
    """
    recipe, folder = Recipe.read(recipe), Path(output) if output is not None else None
    check_trackers(recipe.trackers)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    training = Training(recipe, folder or Path("runs") / recipe.name, data, loaded, hooks, quiet)
    return training.run()


class Training:
    """One start of a run."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: str | Path | None,
        loaded: tuple[Any, Any] | None,
        hooks: Sequence[tuple[int, Hook]],
        quiet: bool,
    ) -> None:
        self.recipe, self.folder, self.hooks, self.quiet = recipe, folder, hooks, quiet
        self.accelerator = setup.make_accelerator(recipe, folder)
        setup.check_sharding(self.accelerator, given=loaded is not None)
        setup.refuse_another_recipe(folder, recipe)
        device = self.accelerator.device
        given: tuple[Any, Any] = loaded or load(recipe.model, dtype=recipe.dtype, device=device, progress=not quiet)
        model, self.tokenizer = given
        self.mixture = sources(recipe.data, self.tokenizer, data)
        torch.manual_seed(recipe.seed)
        self.compressor = recipe.make_compressor()
        if getattr(self.compressor, "tokenizer", self) is None:
            # Methods whose encoder has a tokenizer of its own translate between the two.
            self.compressor.__dict__["tokenizer"] = self.tokenizer
        setup.check_lengths(recipe, model)
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.compressor.bind(model)
        try:
            self._prepare()
        except BaseException:
            self._release()
            raise

    def _prepare(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        self.losses = recipe.losses or dict(self.compressor.losses)
        self.batches = Batches(
            self.mixture,
            recipe.batch_size,
            recipe.target_tokens,
            recipe.seed,
            pad=self.tokenizer.pad_token_id or 0,
            window_tokens=recipe.window_tokens,
        )
        found = checkpoint.newest(self.folder / CHECKPOINTS)
        if found:
            setup.check_processes(accelerator, *found)
        if recipe.warm_start and not found:  # while the weights are whole: prepare() may shard them
            self._warm_start()
        student = Student(self.compressor, recipe.loss_settings)
        if not student.trained():
            raise InputError(f"{self.compressor.name} has nothing to train with these options (rank 0?)")
        if not found:
            setup.check_losses(recipe, student, self.losses, self.batches)
        self.student, self.optimizer = accelerator.prepare(student, setup.make_optimizer(recipe, self.compressor))
        self.frozen = frozen_hashes(accelerator.unwrap_model(self.student))
        self.step, self.seconds = 0, 0.0
        self.last: dict[str, float] = {}
        self.scaling = Scaling(accelerator)
        if found:
            path, state = found
            self.scaling.restore(state)
            checkpoint.restore(path, accelerator, self.student, self.optimizer)
            self.step, self.seconds, self.last = state["step"], state["seconds"], state["losses"]
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
            write_whole(self.folder / setup.CONFIG, text)
            keep_lines(self.folder / LOG, self.step)
        if recipe.trackers:
            accelerator.init_trackers(recipe.name)

    def _warm_start(self) -> None:
        """First weights from the contexts of the first batches; the same in every process."""
        first = stepwise(self.recipe.context_tokens, 0.0, "context_tokens")
        given = [self.batches.batch(step, first).context for step in range(self.recipe.warm_start)]
        self.compressor.warm_start([context.to(self.accelerator.device) for context in given])

    def run(self) -> Trained:
        """All steps that are missing, then the adapter."""
        recipe = self.recipe
        metrics = Metrics(self.folder, self.accelerator, self.step, recipe.steps, self.quiet)
        self.started = time.monotonic() - self.seconds
        try:
            while self.step < recipe.steps and not self._out_of_time():
                values = self._step()
                if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                    metrics.log(self.step, values)
                metrics.step(values["loss"])
                if self.step % recipe.checkpoint_every == 0 or self.step == recipe.steps:
                    self._save()
                for every, hook in self._all_hooks():
                    if every and self.step % every == 0 and self.accelerator.is_main_process:
                        metrics.log(self.step, hook(self.step, self.compressor))
            stopped = "steps" if self.step >= recipe.steps else "time"
            if stopped == "time":
                self._save()
            rows = self._finish()
        finally:
            metrics.close()
            self._release()
        return Trained(self.folder, self.folder / ADAPTER, self.step, self.seconds, stopped, self.last, rows)

    def _release(self) -> None:
        """Give the model back as it came."""
        self.compressor.release()
        for parameter, trainable in self.trainable:
            parameter.requires_grad_(trainable)

    def _all_hooks(self) -> list[tuple[int, Hook]]:
        """Those that were given, and the evaluation in small."""
        if self.sharded:
            return list(self.hooks)

        def in_small(step: int, compressor: LearnedCompressor) -> dict[str, Any]:
            return in_short(small_table(self.recipe, compressor, self.mixture))

        return [*self.hooks, (self.recipe.evaluation_settings.every, in_small)]

    @property
    def sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    def _finish(self) -> list[dict[str, Any]]:
        """The adapter, the curves and the table, which goes on the adapter's card too."""
        check_frozen(self.accelerator.unwrap_model(self.student), self.frozen)
        if not self.accelerator.is_main_process:
            return []
        recipe, compressor = self.recipe, self.compressor
        if self.sharded:
            compressor = whole_compressor(recipe, self.folder / CHECKPOINTS)
        given = (self.folder, recipe, compressor, recipe.final_ratios or [compressor.ratio], self.step, self.seconds)
        save_adapter(*given)
        write_curves(self.folder)
        if not recipe.evaluation_settings.n:
            return []
        rows = final_table(recipe, compressor, self.mixture, self.folder / PARTS, self.step)
        save_adapter(*given, results=write_table(rows, self.folder))
        return rows

    def _out_of_time(self) -> bool:
        limit = self.recipe.max_seconds
        late = limit is not None and self.seconds >= limit
        # Processes must stop together: the clock of one of them decides.
        if limit is not None and self.accelerator.num_processes > 1:
            flag = torch.tensor([float(late)], device=self.accelerator.device)
            late = bool(self.accelerator.reduce(flag, "sum").item())
        return late

    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        done = self.step / self.recipe.steps
        if self.recipe.schedule_by == "time" and self.recipe.max_seconds:
            done = max(done, self.seconds / self.recipe.max_seconds)
        return min(1.0, done)

    def _step(self) -> dict[str, Any]:
        """One optimizer step; returns what is logged."""
        recipe, accelerator, progress = self.recipe, self.accelerator, self.progress()
        context_tokens = stepwise(recipe.context_tokens, progress, "context_tokens")
        ratios = recipe.ratios_at(progress) or [self.compressor.ratio]
        ratio = random.Random(f"{recipe.seed}/ratio/{self.step}").choice(ratios)
        weights = {name: linear(given, progress, name) for name, given in self.losses.items()}
        factor = learning_rate(self.step, progress, recipe.warmup_steps, recipe.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * group["factor"] * factor
        sums: dict[str, float] = {}
        self.student.train()
        self.compressor.backbone.model.eval()
        for micro in range(recipe.accumulate):
            batch = self.batches.batch(self.step, context_tokens, micro, accelerator.process_index)
            last = micro == recipe.accumulate - 1
            drawn = random.Random(f"{recipe.seed}/method/{self.step}/{micro}/{accelerator.process_index}")
            with _maybe(accelerator, self.student, last):
                with self.compressor.drawing(drawn):
                    parts = self.student(batch.to(accelerator.device), weights, ratio)
                self._check(parts, batch)
                accelerator.backward(parts["loss"] / recipe.accumulate)
            for name, value in parts.items():
                shared = accelerator.reduce(value.detach(), "mean") if accelerator.num_processes > 1 else value.detach()
                sums[name] = sums.get(name, 0.0) + float(shared) / recipe.accumulate
        norm = accelerator.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], recipe.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) if norm is not None else 0.0
        if not math.isfinite(norm) and not self.scaling.active:
            self._stop(f"the gradient's norm is {norm}", batch)
        self.optimizer.step()
        if self.scaling.stepped():
            self._stop("the gradients overflowed fp16 in this step and in those before; try bf16", batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds = time.monotonic() - self.started
        self.last = sums
        return {
            **sums,
            "lr": recipe.lr * factor,
            "grad_norm": norm if math.isfinite(norm) else None,  # fp16 left this step out
            "context_tokens": context_tokens,
            "ratio": ratio,
            "seconds": round(self.seconds, 3),
        }

    def _check(self, parts: dict[str, Any], batch: Batch) -> None:
        """Stop all processes together if a loss of any of them is no number."""
        bad = [name for name, value in parts.items() if not math.isfinite(float(value.detach()))]
        count = torch.tensor([float(bool(bad))], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count, "sum")
        if count.item():
            self._stop(f"the loss is no number ({', '.join(bad) or 'in another process'})", batch)

    def _stop(self, why: str, batch: Batch) -> None:
        kept = checkpoint.newest(self.folder / CHECKPOINTS)
        where = f"the last good checkpoint is {kept[0].name}" if kept else "there was no checkpoint yet"
        names = "; ".join(batch.names)
        raise TrainingError(
            f"step {self.step + 1}: {why}. The batch was [{names}] (seed {self.recipe.seed}). Nothing of this step was "
            f"applied, {where}; lower lr, or look at these documents"
        )

    def _save(self) -> None:
        state = {"step": self.step, "seconds": self.seconds, "losses": self.last, **self.scaling.state()}
        folder, keep = self.folder / CHECKPOINTS, self.recipe.keep_checkpoints
        checkpoint.save(folder, self.accelerator, self.student, self.optimizer, state, keep)


def _maybe(accelerator: Accelerator, student: Any, synchronise: bool) -> Any:
    """Gradients are exchanged between processes only with the last micro-batch."""
    return nullcontext() if synchronise else accelerator.no_sync(student)
