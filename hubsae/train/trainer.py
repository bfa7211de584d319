"""The training loop: one stream of batches through a bank of SAEs, with everything around a step.

Read `Run.fit` first: it is the whole story. A step itself is `learn`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae import kernels
from hubsae.activations.activation_set import Batch, PairedActivations
from hubsae.core.errors import ConfigError, DataError, HubSAEError, TrainingInterrupted
from hubsae.core.files import read_json, write_json_atomic
from hubsae.core.normalizer import Normalizer
from hubsae.core.progress import Task, progress
from hubsae.core.sae import SAE
from hubsae.core.scopes import ALL, excluding
from hubsae.kernels import linear
from hubsae.train import checkpoint, data, dead, init, preflight, select, validate
from hubsae.train.best import Best
from hubsae.train.config import TrainConfig
from hubsae.train.export import Exporter
from hubsae.train.interrupt import Signals, flushed_denormals
from hubsae.train.learn import learn, settle
from hubsae.train.log import Log
from hubsae.train.parallel import Solo, connect, shares
from hubsae.train.result import TrainResult
from hubsae.train.schedule import learning_rate, sparsity_scale
from hubsae.train.state import SHARED, Bank, Cell

# rows of training data that a batch_topk SAE's inference threshold is taken from, before every evaluation
CALIBRATION_ROWS = 16_384


class Run:
    """SAEs of one width that read the same batches. Made by `train`, `train_many` and `train_chain`."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        activations: Any,
        *,
        out: str | os.PathLike[str] | None = None,
        starts: Sequence[Any] | None = None,
        val: Any = None,
        resume: bool = True,
        device: str | torch.device = "cpu",
        space: Normalizer | None = None,
        quiet: bool = False,
    ):
        self.out = out = None if out is None else Path(out)
        self.device, self.quiet = torch.device(device), quiet
        source = data.as_source(activations)
        self.d_out: int | None = getattr(source, "d_out", None)  # of pairs of hook points: these are transcoders
        configs = [config.for_target(self.d_out) for config in configs]
        first = self.first = configs[0]
        self.comm: Solo = connect(first.parallel)
        # for passes in which every rank sees every row: calibration, resampling
        self.same_rows = self.comm if self.comm.splits_latents else Solo()
        self.source, self.val = data.split(source, val, first.val_fraction)
        d = self.source.d
        ranks = self.comm.world if self.comm.splits_rows else 1
        preflight.check_settings(configs, d, self.source.n_rows, ranks=ranks)
        preflight.check_data(configs, self.source, self.val)
        self.steps_per_epoch, self.total = first.steps(self.source.n_rows)
        self.local_batch = first.batch_size // ranks
        self.states: Path | None = None
        if out is not None:
            self.states = out / (f"state.rank{self.comm.rank}" if self.comm.splits_latents else "state")
            settings = preflight.settings_of(configs, self.source)
            if resume:
                preflight.check_folder(out, settings, self.states)
            if self.comm.rank == 0:
                write_json_atomic(out / "config.json", {**settings, "sha256": checkpoint.digest(settings)})
        self.bank = Bank(configs, d, d_out=self.d_out, device=self.device, shares=shares(configs, d, self.comm))
        self.cells = self.bank.cells
        for cell, start in zip(self.cells, starts if starts is not None else [None] * len(configs), strict=True):
            cell.parent = init.resolve(start)
            cell.best = Best(None if out is None else out / "best" / cell.config.name, cell.config.keep_best)
        self.log = Log(out if self.comm.rank == 0 else None, first)
        self.task = Task("training")
        self.step, self.epoch = 0, 0
        self.finished = False
        self._timed = (time.perf_counter(), 0)
        found = self._whole_state() if out is not None and resume else None
        if found is not None:
            self._restore(*found)
        else:
            self._start(space)
        self.exporter = Exporter(
            self.source, self.scope, self.space, self.space_out, self.steps_per_epoch, self.d_out is not None
        )

    # ---- starting ---------------------------------------------------------------------------------------

    def _start(self, space: Normalizer | None) -> None:
        self.log.fresh()
        self.scope = data.scope_of(self.first, self.source)
        parents = [c.parent.normalizer for c in self.cells if c.parent is not None and c.parent.normalizer is not None]
        given = space if space is not None else parents[0] if parents else None
        if self.first.normalize != "none" and given is not None and self.d_out is None:
            # latents of a warm start mean the same only in the space they were trained in
            self.space, self.space_out = given, None
        else:
            self.space, self.space_out = data.spaces(self.first, self.source, self.scope)
            if self.space is not None and given is not None:
                self.space = given
        rows: Batch | None = None
        for cell in self.cells:
            if cell.parent is not None:
                init.check_warm(cell.config, self.source.d, cell.total, cell.parent, self.d_out)
                init.warm(cell, cell.parent, self.space, self.space_out)
            else:
                if rows is None:
                    rows = self._sample(cell.config.init.rows, self.first.data_seed)
                    for part in (rows.x, *([rows.target] if rows.target is not None else [])):
                        data.check_finite(part, "the activations")
                init.fresh(cell, rows)

    def _whole_state(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest state that is as it was written, the same on all ranks."""
        assert self.states is not None
        found = checkpoint.newest_whole(self.states, self._check_state)
        step = int(self.comm.lowest(torch.tensor(-1 if found is None else found[1]["step"])))
        if step < 0:
            return None
        if found is None or found[1]["step"] != step:
            found = checkpoint.newest_whole(self.states, self._check_state, at_most=step)
        self.comm.barrier()
        if found is not None and (self.comm.rank == 0 or self.comm.splits_latents):
            checkpoint.remove(state for state in checkpoint.states(found[0].parent) if state > found[0])
        return found

    def _check_state(self, state: dict[str, Any]) -> None:
        """What a state names outside its folder: the best checkpoints."""
        for cell, scalars in zip(self.cells, state["cells"], strict=False):
            for entry in scalars["best"]:
                cell.best.check(entry)

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        checkpoint.load(path, self.cells, state)
        self.step, self.epoch, self.finished = state["step"], state["epoch"], state["finished"]
        self.space, self.space_out = (_normalizer(state.get(name)) for name in ("space", "space_out"))
        self.scope = excluding(self.first.excluded, state["massive_above"])
        linear.adopt(state["linear"])
        if state["source"] is not None:
            self.source.load_state_dict(state["source"])
        self.log.resume(state["log"])

    # ---- the loop ---------------------------------------------------------------------------------------

    def fit(self) -> list[TrainResult]:
        """Train to the end, from wherever the run stands."""
        return fit_together([self])[0]

    def steps(self) -> Iterator[int]:
        """The loop: a step, and what is due between steps; for `fit_together`, which sets the stage."""
        while self.step < self.total and self.bank.live and not self.finished:
            for batch in self._batches():
                self._train(batch)
                self.task.update(self.step * self.first.batch_size)
                if self.step % self.first.log_every == 0 or self.step == self.total:
                    self._report(batch.x if batch.target is None else batch.target)
                self._between()
                yield self.step
                if self.step >= self.total or not self.bank.live:
                    break
            self.epoch += 1

    def stop(self) -> TrainingInterrupted:
        """Save, and say where; the error to raise."""
        self._settle(self.bank.live)  # a state would not remember a loss that nobody has looked at yet
        self._save()
        self.log.close()
        if self.out is None:
            kept, how = "there is no run folder (out=), so nothing was kept", "pass out= to be able to resume"
        else:
            kept, how = f"state of step {self.step} is in {self.out}", "start the same command again to go on"
        return TrainingInterrupted(f"interrupted after step {self.step} of {self.total}: {kept}", hint=how)

    def _batches(self) -> Iterator[Batch]:
        rank, world = (self.comm.rank, self.comm.world) if self.comm.splits_rows else (0, 1)
        options = {"seed": self.first.data_seed, "epoch": self.epoch, "rank": rank, "world_size": world}
        for batch in data.batches(self.source, self.scope, self.local_batch, **options):
            if len(batch.x) == self.local_batch:
                yield self._in_space(data.kept(batch, self.scope))

    def _in_space(self, rows: Batch) -> Batch:
        """Raw activations in training space, float32, on the device."""

        def placed(x: Tensor, space: Normalizer | None) -> Tensor:
            if self.device.type == "cuda" and not x.is_cuda:
                # from pinned memory, so that the host does not wait for the copy; widened only when it is there
                x = x.pin_memory().to(self.device, non_blocking=True)
            x = x.to(self.device, torch.float32)
            return x if space is None else space.apply(x)

        return rows.mapped(partial(placed, space=self.space), partial(placed, space=self.space_out))

    def _sample(self, rows: int, seed: int) -> Batch:
        """Random training tokens in training space."""
        return self._in_space(data.sample(self.source, rows, seed, self.scope))

    def _train(self, batch: Batch) -> None:
        """One optimiser step of every living cell."""
        for cell in self.bank.live:
            cell.lr = learning_rate(cell.config, self.step, self.total)
            cell.sparsity = sparsity_scale(cell.config, self.step)
        x, rows = batch.x, len(batch)
        if self.comm.splits_rows:
            rows = int(self.comm.sum(torch.tensor(rows, device=x.device)))
        if rows == 0:
            raise DataError("every token of a batch is left out", hint="leave out fewer (exclude, max_norm_factor)")
        before = self.bank.live
        try:
            parts = self.first.accumulate
            learn(self.bank, x, self.comm, rows, number=self.step, accumulate=parts, target=batch.target)
        except DataError as error:
            raise self._with_last_good(error) from None
        self._settle(before, looked_at=self._looked_at(self.step + 1))
        if self.bank.live:
            self.step += 1

    def _settle(self, before: Sequence[Cell], *, looked_at: bool = True) -> None:
        """Note which of the cells that lived before are out; of losses that were not waited for only if looked at."""
        try:
            if looked_at:
                settle(self.bank)
        except DataError as error:
            raise self._with_last_good(error) from None
        for cell in before:
            if cell.failed is not None:
                cell.failed = self._with_last_good(cell.failed)
                self.log.add("failed", self.step, cell.config.name, error=cell.failed.message)

    def _looked_at(self, step: int) -> bool:
        """Whether this step's numbers are read: it is logged, evaluated, saved, or the last."""
        marks = (self.first.log_every, self.first.eval_every, self.first.checkpoint_every, None)
        return step >= self.total or any(self._due(every, step) for every in marks)

    def _due(self, every: int | None, step: int) -> bool:
        """Whether this step is one of every so many, or the last of an epoch."""
        return step % (every or self.steps_per_epoch) == 0

    def _with_last_good(self, error: HubSAEError) -> HubSAEError:
        good = checkpoint.latest(self.states) if self.states is not None else None
        where = f"the last good state is {good}" if good else "no checkpoint was written before"
        return type(error)(error.message, hint=f"{error.hint}; {where}")

    # ---- between steps ----------------------------------------------------------------------------------

    def _report(self, target: Tensor) -> None:
        then, at = self._timed
        clock = time.perf_counter()
        speed = (self.step - at) * self.first.batch_size / max(clock - then, 1e-9)
        self._timed = (clock, self.step)
        if not self.bank.live:
            return
        rows = int(self.comm.sum(torch.tensor(target.shape[0], device=target.device)))
        variance = float(self.comm.sum((target - self.comm.sum(target.sum(0)) / rows).square().sum()))
        text = []
        for cell in self.bank.live:
            now = cell.now
            mse = float(self.comm.sum(torch.tensor(now["mse"])) if self.comm.splits_rows else now["mse"])
            values = {
                "tokens": cell.tokens,
                "loss": float(now["loss"]),
                "mse": mse,
                "fvu": mse * rows * target.shape[1] / max(variance, 1e-12),
                "l0": float(now["l0"]),
                "dead": float(self.comm.sum_latents(cell.dead().double().sum())) / cell.total,
                "lr": cell.lr,
                "tokens_per_s": round(speed),
                **{name: float(now[name]) for name in ("aux_loss", "sparsity_loss") if name in now},
            }
            self.log.add("train", self.step, cell.config.name, **values)
            name = f"{cell.config.name} " if len(self.cells) > 1 else ""
            text.append(f"{name}loss {values['loss']:.4g} fvu {values['fvu']:.3f} L0 {values['l0']:.0f}")
        self.task.note("; ".join(text))

    def _between(self) -> None:
        epoch, within = divmod(self.step, self.steps_per_epoch)
        if not within:
            for cell in self.bank.live:
                cell.end_epoch()
        last = self.step >= self.total
        if last or self._due(self.first.eval_every, self.step):
            self._evaluate()
        if not last:
            # after the evaluation: resampling makes an SAE worse at first, and the state before it may be the best
            for cell in self.bank.live:
                settings = cell.config.dead.resample
                if settings is not None and settings.due(self.step, 0 if within else epoch):
                    tokens = self._sample(settings.tokens, cell.config.seed + self.step)
                    count = dead.resample(cell, tokens, self.same_rows)
                    cell.resampled += count
                    self.log.add("resample", self.step, cell.config.name, count=count, method=settings.method)
            if self._due(self.first.checkpoint_every, self.step):
                self._save()

    def _evaluate(self) -> None:
        """Validate the SAEs as they would be exported now, and offer the weights to the best ones."""
        self._calibrate()
        validated = {} if self.val is None else self._validate(self.bank.live, self.val)
        for cell in self.bank.live:
            total_loss, l0, steps = cell.sums
            values = {"train_loss": total_loss / max(steps, 1e-9), "train_l0": l0 / max(steps, 1e-9)}
            values |= validated.get(cell.config.name, {})
            cell.sums, cell.measured = [0.0, 0.0, 0.0], values
            self.log.add("eval", self.step, cell.config.name, tokens=cell.tokens, **values)
            metric = cell.config.metric or ("val_mse" if self.val is not None else "train_loss")
            entry = {"step": self.step, "metric": metric, "value": values[metric], "values": values}
            entry |= {"threshold": cell.threshold, "tokens": cell.tokens}
            if self.out is not None or (cell.config.select == "best" and cell.config.keep_best > 0):
                weights = self._gathered(cell)
                if self.comm.rank == 0:
                    cell.best.offer(weights, entry)
                self.comm.barrier()
                if self.comm.rank > 0:
                    cell.best.offer(weights, entry, written=True)

    def _calibrate(self) -> None:
        """Inference thresholds of batch_topk SAEs: where k latents fire per token, over a fixed set of rows."""
        cells = [cell for cell in self.bank.live if cell.config.architecture == "batch_topk"]
        if cells:
            rows = self._sample(max(CALIBRATION_ROWS, self.first.batch_size), self.first.data_seed)
            for cell in cells:
                cell.threshold = select.inference_threshold(cell, rows.x, self.same_rows)

    @torch.no_grad()
    def validate_now(self) -> dict[str, float]:
        """Metrics of the first cell as it stands, on the validation data, or on training rows where there is none."""
        val = self.val
        if val is None:
            rows = data.sample(self.source, self.first.eval_rows, self.first.data_seed, self.scope)
            paired = rows.target is not None and PairedActivations.from_tensors(rows.x, rows.target)
            val = paired or data.TensorSource(rows.x)
        cell = self.cells[0]
        if cell.threshold is None:
            self._calibrate()
        return self._validate([cell], val)[cell.config.name]

    def _validate(self, cells: list[Cell], val: data.Source) -> dict[str, dict[str, float]]:
        saes = {cell.config.name: self.standing(cell).to(self.device) for cell in cells}
        scope = self.scope
        if val is not self.val:  # rows of training, already chosen, without labels
            scope = ALL
            for sae in saes.values():
                sae.metadata.training.exclude = []
        return validate.measure(saes, val, scope, limit=self.first.eval_rows)

    def _gathered(self, cell: Cell) -> dict[str, Tensor]:
        """The weights of a cell, over all ranks that hold a share of its latents."""
        weights = {"W_enc": cell.W_enc, "W_dec": cell.W_dec, **cell.vectors}
        if not self.comm.splits_latents:
            return weights
        return {n: t if n in SHARED else torch.cat(self.comm.gather(t)) for n, t in weights.items()}

    def _save(self) -> None:
        if self.comm.rank == 0:
            self.log.add("checkpoint", self.step, "")
        if self.states is not None and (self.comm.rank == 0 or self.comm.splits_latents):
            at_end_of_epoch = self._due(None, self.step)
            state = {
                "epoch": self.epoch + (1 if at_end_of_epoch else 0),
                "finished": self.finished,
                "space": _facts(self.space),
                "space_out": _facts(self.space_out),
                "massive_above": self.scope.massive_above,
                "log": self.log.mark(),
                "linear": linear.decisions(),
                "source": None if at_end_of_epoch else self.source.state_dict(),
            }
            # behind the end nothing goes on from the state before
            keep = 1 if self.finished else 2
            checkpoint.save(self.states, self.cells, self.step, state, keep=keep)
            if self.comm.rank == 0:
                self._prune()
        self.comm.barrier()

    def _prune(self) -> None:
        """Remove best checkpoints that no state names."""
        assert self.states is not None
        folders = checkpoint.states(self.states)[:-1]
        before = [read_json(folder / "state.json")["cells"] for folder in folders]
        for cell in self.cells:
            kept = [*cell.best.kept, *(entry for cells in before for entry in cells[cell.index]["best"])]
            cell.best.prune(entry["step"] for entry in kept)

    # ---- the end ----------------------------------------------------------------------------------------

    def _finish(self) -> list[TrainResult]:
        results = []
        for cell in self.cells:
            history = [line for line in self.log.lines if line["cell"] == cell.config.name]
            result = TrainResult(cell.config.name, cell.config, None, history, self.step, cell.tokens, self.out)
            results.append(result)
            if cell.failed is not None:
                result.error = cell.failed
                continue
            chosen = cell.best.kept[0] if cell.best.kept and cell.config.select == "best" else None
            result.metrics = {k: v for k, v in cell.measured.items() if k.startswith(("val_", "train_"))}
            if chosen is None:
                result.sae = self.standing(cell, result.metrics)
            else:
                result.best = {name: chosen[name] for name in ("step", "metric", "value")}
                result.metrics = chosen["values"]
                result.sae = self.exporter.sae(cell, cell.best.load(chosen), chosen, result.metrics)
            if self.out is not None and self.comm.rank == 0:
                # of a finished run as well: the files may have been damaged since
                result.write(self.out / "sae" if len(self.cells) == 1 else self.out / "sae" / cell.config.name)
        if not self.finished:
            self.finished = True
            for cell in self.bank.live:
                self.log.add("done", self.step, cell.config.name, tokens=cell.tokens)
            self._save()
        elif self.states is not None and self.comm.rank == 0:
            checkpoint.remove(checkpoint.states(self.states)[:-1])  # it was killed at its end
            self._prune()
        self.log.close()
        return results

    def standing(self, cell: Cell, metrics: dict[str, float] | None = None) -> SAE:
        """A cell as an SAE on raw activations, as it is now."""
        moment = {"step": self.step, "tokens": cell.tokens, "threshold": cell.threshold}
        return self.exporter.sae(cell, self._gathered(cell), moment, metrics)


def fit_together(runs: Sequence[Run]) -> list[list[TrainResult]]:
    """Train runs side by side, always the one furthest behind, so that they can share what a live source gives."""
    first = runs[0].first
    if first.kernels != "torch" and find_spec(first.kernels) is None:
        raise ConfigError(
            f"kernels: {first.kernels} needs the package {first.kernels}, which is not installed",
            hint="it comes with PyTorch for CUDA (or pip install triton); kernels: torch runs everywhere",
        )
    with torch.no_grad(), kernels.using(first.kernels), flushed_denormals(), Signals() as asked, ExitStack() as stack:
        for run in runs:
            name = "training" if len(runs) == 1 else f"training {run.first.name}"
            show = False if run.quiet else None
            run.task = stack.enter_context(progress(name, run.total * first.batch_size, "tokens", show=show))
            run.task.resumed(run.step * first.batch_size)
        going = {run: run.steps() for run in runs}
        while going:
            run = min(going, key=lambda run: run.step)
            if next(going[run], None) is None:
                del going[run]
            elif asked.number:
                first_stop, *_ = [run.stop() for run in runs]  # every run saves
                raise first_stop
        results = [run._finish() for run in runs]
    if asked.number:  # it came behind the last step
        out = runs[0].out
        where = f"everything is in {out}" if out else "its result is lost, there is no run folder (out=)"
        raise TrainingInterrupted(f"interrupted when training was done: {where}")
    return results


def _facts(space: Normalizer | None) -> dict[str, Any] | None:
    return space and {"mean": space.mean.tolist(), "std": space.std.tolist(), "count": space.count}


def _normalizer(facts: dict[str, Any] | None) -> Normalizer | None:
    if facts is None:
        return None
    return Normalizer(torch.tensor(facts["mean"]), torch.tensor(facts["std"]), facts["count"])
