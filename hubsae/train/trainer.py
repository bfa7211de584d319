"""The training loop: one stream of batches through one or several banks of SAEs, with everything around a step.

Read `Run.fit` first: it is the whole story. A step itself is `step.forward`, `step.signals`, `update.apply`.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubsae import kernels
from hubsae.core.errors import ConfigError, DataError, TrainingError, TrainingInterrupted
from hubsae.core.extras import require
from hubsae.core.files import read_json, write_json_atomic
from hubsae.core.normalizer import Normalizer
from hubsae.kernels import linear
from hubsae.train import checkpoint, data, dead, export, init, step, update, validate
from hubsae.train.config import TrainConfig
from hubsae.train.crew import Crew, deal
from hubsae.train.log import Log
from hubsae.train.parallel import Solo, connect
from hubsae.train.result import TrainResult, as_metadata
from hubsae.train.schedule import learning_rate, sparsity_scale
from hubsae.train.state import Bank, Cell

# a loss this many times the first one is an explosion, not a fluctuation
EXPLODED = 1e4


class Run:
    """SAEs of one width that read the same batches. Made by `train`, `train_many` and `train_chain`."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        activations: Any,
        *,
        out: Path | None = None,
        starts: Sequence[Any] | None = None,
        val: Any = None,
        resume: bool = True,
        device: str | torch.device = "cpu",
        space: Normalizer | None = None,
        quiet: bool = False,
    ):
        first = self.first = configs[0]
        self.out, self.device, self.quiet = out, torch.device(device), quiet
        self.comm: Solo = connect(first.parallel)
        # for passes in which every rank sees every row: validation, resampling
        self.same_rows = self.comm if self.comm.splits_latents else Solo()
        self.source, self.val = data.split(data.as_source(activations), val, first.val_fraction)
        d = self.source.d
        if self.val is not None and self.val.d != d:
            raise DataError(f"validation activations have width {self.val.d}, training ones {d}")
        ranks = self.comm.world if self.comm.splits_rows else 1
        if first.batch_size % (ranks * first.accumulate):
            raise ConfigError(
                f"batch_size {first.batch_size} does not divide into {ranks} ranks x {first.accumulate} parts",
                hint="choose a multiple",
            )
        self.local_batch = first.batch_size // ranks
        self.steps_per_epoch = self.source.n_rows // first.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"batch_size {first.batch_size} is larger than the data ({self.source.n_rows} rows)",
                hint=f"set batch_size to at most {self.source.n_rows}",
            )
        if first.tokens is not None:
            self.total = max(1, first.tokens // first.batch_size)
        else:
            self.total = max(1, round(first.epochs * self.steps_per_epoch))
        for config in configs:
            width = config.width(d)
            if config.k is not None and config.k > width:
                raise ConfigError(
                    f"{config.name}: k={config.k} is larger than d_sae={width}", hint="lower k or raise the expansion"
                )
            if config.architecture == "gated" and self.comm.splits_latents:
                raise ConfigError(f"{config.name}: gated SAEs cannot be split by latents", hint="use parallel: data")
        self.crew = Crew(self._threads(configs))
        self.banks = self._deal(configs, d)
        self.cells = sorted((cell for bank in self.banks for cell in bank.cells), key=lambda cell: cell.index)
        given = list(starts) if starts is not None else [None] * len(configs)
        self.parents = [init.resolve(start) for start in given]
        self.bests = [checkpoint.Best(None if out is None else out / "best" / c.name, c.keep_best) for c in configs]
        self.log = Log(
            out if self.comm.rank == 0 else None, list(configs), self.total, quiet=quiet or self.comm.rank > 0
        )
        self.step, self.epoch = 0, 0
        self.sums: dict[int, list[float]] = {cell.index: [0.0, 0.0, 0.0] for cell in self.cells}
        self.first_loss: dict[int, float] = {}
        self.resampled = {cell.index: 0 for cell in self.cells}
        self.finished = False
        self.suffix = f".rank{self.comm.rank}" if self.comm.splits_latents else ""
        self._stop = False
        self._timed = (time.perf_counter(), 0)
        state = checkpoint.latest(out, suffix=self.suffix) if out is not None and resume else None
        self._check_folder(configs, state, resume)
        if state is not None:
            self._restore(state)
        else:
            self._start(space)

    # ---- starting ---------------------------------------------------------------------------------------

    def _threads(self, configs: Sequence[TrainConfig]) -> int:
        """How many threads step cells side by side: as many as PyTorch has for its operators."""
        alone = self.device.type != "cpu" or self.comm.world > 1 or self.first.kernels != "torch"
        return 1 if alone else min(len(configs), torch.get_num_threads())

    def _deal(self, configs: Sequence[TrainConfig], d: int) -> list[Bank]:
        shares = self._shares(configs, d)
        banks = []
        for hand in deal(configs, d, self.crew.members):
            mine = None if shares is None else [shares[number] for number in hand]
            banks.append(Bank([configs[i] for i in hand], d, device=self.device, shares=mine, numbers=hand))
        return banks

    @property
    def live(self) -> list[Cell]:
        """Cells that have not failed."""
        return [cell for cell in self.cells if cell.failed is None]

    def _shares(self, configs: Sequence[TrainConfig], d: int) -> list[tuple[int, int]] | None:
        if not self.comm.splits_latents:
            return None
        world, rank, shares = self.comm.world, self.comm.rank, []
        for config in configs:
            width = config.width(d)
            if width % world or (config.k or 0) > width // world:
                raise ConfigError(
                    f"{config.name}: d_sae={width} does not split into {world} ranks of equal width above k",
                    hint="choose d_sae as a multiple of the number of ranks, or parallel: data",
                )
            shares.append((rank * width // world, (rank + 1) * width // world))
        return shares

    def _check_folder(self, configs: Sequence[TrainConfig], state: Path | None, resume: bool) -> None:
        """A run folder belongs to one configuration."""
        if self.out is None:
            return
        file = self.out / "config.json"
        told = {
            "cells": [c.model_dump(mode="json") for c in configs],
            "d_in": self.source.d,
            "rows": self.source.n_rows,
        }
        if state is not None and file.exists():
            before = read_json(file)
            if before != told:
                wrong = [k for k in ("d_in", "rows") if before.get(k) != told[k]]
                for old, new in zip(before.get("cells", []), told["cells"], strict=False):
                    wrong += [f"{new['name']}.{k}" for k in new if old.get(k) != new[k]]
                raise ConfigError(
                    f"{self.out} holds a run with other settings: {', '.join(wrong) or 'another list of SAEs'}",
                    hint="choose another folder, or start over there with resume=False (--fresh)",
                )
        if self.comm.rank == 0:
            write_json_atomic(file, told)

    def _start(self, space: Normalizer | None) -> None:
        self.log.fresh()
        parents = [p.normalizer for p in self.parents if p is not None and p.normalizer is not None]
        if self.first.normalize == "none":
            self.space = None
        elif space is not None or parents:
            # latents of a warm start mean the same only in the space they were trained in
            self.space = space if space is not None else parents[0]
        else:
            self.space = data.normalizer(self.first, self.source)
        self.limit = data.norm_limit(self.first, self.source)
        rows: Tensor | None = None
        for cell, parent in zip(self.cells, self.parents, strict=True):
            if parent is not None:
                init.warm(cell, parent, self.space)
            else:
                if rows is None:
                    rows = self._prepare(data.sample(self.source, cell.config.init.rows, self.first.data_seed))
                    data._check_finite(rows, "the activations")
                init.fresh(cell, rows)

    def _restore(self, path: Path) -> None:
        state = checkpoint.load(path, self.cells)
        self.step, self.epoch, self.finished = state["step"], state["epoch"], state["finished"]
        space = state["space"]
        self.space = None
        if space is not None:
            self.space = Normalizer(torch.tensor(space["mean"]), torch.tensor(space["std"]), space["count"])
        self.limit = state["limit"]
        for cell, best in zip(self.cells, self.bests, strict=True):
            key = str(cell.index)
            self.sums[cell.index] = state["sums"][key]
            self.resampled[cell.index] = state["resampled"][key]
            if key in state["first_loss"]:
                self.first_loss[cell.index] = state["first_loss"][key]
            if key in state["failed"]:
                cell.failed = TrainingError(state["failed"][key])
            best.restore(state["best"][cell.index])
        linear.adopt(state["linear"])
        if state["source"] is not None:
            self.source.load_state_dict(state["source"])
        self.log.resume(self.step)

    # ---- the loop ---------------------------------------------------------------------------------------

    def fit(self) -> list[TrainResult]:
        """Train to the end, from wherever the run stands."""
        if self.first.kernels != "torch":
            require(self.first.kernels, extra="fast")
        with torch.no_grad(), kernels.using(self.first.kernels), _flushed_denormals(), self.crew, self._interruptible():
            while self.step < self.total and self.live and not self.finished:
                for x in self._batches():
                    self._train(x)
                    if self.step % self.first.log_every == 0 or self.step == self.total:
                        self._report(x)
                    self._between(epoch_ended=self.step % self.steps_per_epoch == 0)
                    if self.step >= self.total or not self.live:
                        break
                self.epoch += 1
            results = self._finish()
        return results

    def _batches(self) -> Iterator[Tensor]:
        rank, world = (self.comm.rank, self.comm.world) if self.comm.splits_rows else (0, 1)
        stream = self.source.batches(
            self.local_batch, seed=self.first.data_seed, epoch=self.epoch, rank=rank, world_size=world
        )
        for raw in stream:
            if raw.shape[0] == self.local_batch:
                yield self._prepare(raw)

    def _prepare(self, raw: Tensor) -> Tensor:
        """Raw activations in training space, float32, without tokens of massive norm."""
        x = raw.to(self.device, torch.float32)
        if self.limit is not None:
            x = x[x.norm(dim=1) <= self.limit]
        return x if self.space is None else self.space.apply(x)

    def _train(self, x: Tensor) -> None:
        """One optimiser step of every living cell."""
        self._now: dict[int, dict[str, Any]] = {}
        for cell in self.live:
            cell.lr = learning_rate(cell.config, self.step, self.total)
            cell.sparsity = sparsity_scale(cell.config, self.step)
        rows = x.shape[0]
        if self.comm.splits_rows:
            rows = int(self.comm.sum(torch.tensor(rows, device=x.device)))
        if rows == 0:
            raise DataError("every token of a batch is above max_norm_factor", hint="raise max_norm_factor")
        before = self.live
        self.crew.map(lambda bank: self._train_bank(bank, x, rows), self.banks)
        for cell in before:
            if cell.failed is not None:
                self.log.add("failed", self.step, cell.config.name, error=cell.failed.message)
        if self.live:
            self.step += 1

    def _train_bank(self, bank: Bank, x: Tensor, rows: int) -> None:
        """One step of the cells of a bank; nothing here may write to what banks share."""
        if self.first.accumulate > 1 or self.first.clip is not None or self.comm.splits_rows:
            return self._train_collected(bank, x, rows)
        f = self._forward(bank, x, rows)
        if f is not None:
            s = step.signals(bank, f, self.comm, rows)
            update.apply(bank, f, s)
            self._count(bank, f, s, rows)

    def _train_collected(self, bank: Bank, x: Tensor, rows: int) -> None:
        """A step that needs whole gradients: clipping, accumulation, data-parallel ranks."""
        vectors: list[dict[str, Tensor]] = []
        fired = torch.zeros(bank.n, dtype=torch.bool, device=x.device)
        cells: list[Cell] = []
        for part in x.split(math.ceil(x.shape[0] / self.first.accumulate)):
            f = self._forward(bank, part, rows)
            if f is None:
                return
            s = step.signals(bank, f, self.comm, rows)
            update.collect(bank, f, s)
            self._count(bank, f, s, rows)
            live = bank.live
            if len(live) != len(cells):  # a cell failed in a later part
                vectors = [v for v, c in zip(vectors, cells, strict=True) if c in live]
                cells = live
            if not vectors:
                vectors = s.vectors
            else:
                for sums, new in zip(vectors, s.vectors, strict=True):
                    for name in sums:
                        sums[name] = sums[name] + new[name]
            fired |= s.fired > 0
            for cell, extra in zip(live, s.aux, strict=True):
                if cell.config.architecture in ("jumprelu", "gated"):
                    fired[cell.low : cell.high] = True  # gradients reach latents that did not fire
                if extra is not None:
                    fired[cell.low + extra.ids] = True
        update.apply_stored(bank, vectors, fired, self.comm)

    def _forward(self, bank: Bank, x: Tensor, rows: int) -> step.Forward | None:
        """The forward pass; a cell whose loss is not a number is taken out before it moves any weight."""
        while bank.live:
            f = step.forward(bank, x, self.comm, rows)
            losses = self._summed(f.losses).tolist()
            bad = False
            for cell, loss in zip(bank.live, losses, strict=True):
                first = self.first_loss.setdefault(cell.index, loss)
                if math.isfinite(loss) and loss <= EXPLODED * max(first, 1e-12):
                    continue
                self._fail(cell, x, loss)
                bad = True
            if not bad:
                for cell, loss, mse in zip(bank.live, losses, f.mse.tolist(), strict=True):
                    self.sums[cell.index][0] += loss
                    self._add(cell, loss=loss, mse=mse)
                return f
        return None

    def _summed(self, values: Tensor) -> Tensor:
        return self.comm.sum(values.clone()) if self.comm.splits_rows else values

    def _fail(self, cell: Cell, x: Tensor, loss: float) -> None:
        broken = (~torch.isfinite(x)).any(1)
        if bool(broken.any()):
            raise DataError(
                f"step {self.step}: row {int(broken.nonzero()[0])} of the batch holds NaN or infinity "
                f"({int(broken.sum())} of {x.shape[0]} rows)",
                hint="harvest again in float32 or bfloat16, or filter the data; " + self._last_good(),
            )
        cell.failed = TrainingError(
            f"{cell.config.name}: the loss became {loss:.4g} at step {self.step} "
            f"(it was {self.first_loss[cell.index]:.4g} at the start)",
            hint="lower lr, add a warm-up (schedule.warmup_steps) or clip; " + self._last_good(),
        )

    def _last_good(self) -> str:
        good = checkpoint.latest(self.out, suffix=self.suffix) if self.out is not None else None
        return f"the last good state is {good}" if good else "no checkpoint was written before"

    def _add(self, cell: Cell, **values: Any) -> None:
        """Add a part's statistics to those of the step; parts of an accumulated batch sum to the batch's."""
        now = self._now.setdefault(cell.index, {})
        for name, value in values.items():
            if value is not None:
                now[name] = now.get(name, 0.0) + value

    def _count(self, bank: Bank, f: step.Forward, s: step.Signals, rows: int) -> None:
        bank.count(self._summed(s.fired), rows // self.first.accumulate)
        for i, (cell, l0) in enumerate(zip(bank.live, s.l0.tolist(), strict=True)):
            self._add(cell, l0=l0, aux_loss=s.aux_loss[i], sparsity_loss=s.penalty[i])
            self.sums[cell.index][1] += l0
            self.sums[cell.index][2] += 1 / self.first.accumulate
            if cell.config.architecture == "batch_topk" and cell.last_threshold:
                rate, old = cell.config.threshold_lr, cell.threshold
                now = cell.last_threshold
                cell.threshold = now if old is None else (1 - rate) * old + rate * now

    # ---- between steps ----------------------------------------------------------------------------------

    def _report(self, x: Tensor) -> None:
        then, at = self._timed
        clock = time.perf_counter()
        speed = (self.step - at) * self.first.batch_size / max(clock - then, 1e-9)
        self._timed = (clock, self.step)
        if not self.live:
            return
        rows = int(self.comm.sum(torch.tensor(x.shape[0], device=x.device)))
        variance = float(self.comm.sum((x - self.comm.sum(x.sum(0)) / rows).square().sum()))
        text = []
        for cell in self.live:
            now = self._now[cell.index]
            mse = float(self._summed(torch.as_tensor(now["mse"])))
            values = {
                "tokens": cell.tokens,
                "loss": float(now["loss"]),
                "mse": mse,
                "fvu": mse * rows * self.source.d / max(variance, 1e-12),
                "l0": float(now["l0"]),
                "dead": self._dead_share(cell),
                "lr": cell.lr,
                "tokens_per_s": round(speed),
                **{name: float(now[name]) for name in ("aux_loss", "sparsity_loss") if name in now},
            }
            self.log.add("train", self.step, cell.config.name, **values)
            text.append(
                f"loss {values['loss']:.4g} fvu {values['fvu']:.3f} L0 {values['l0']:.0f} dead {values['dead']:.1%}"
            )
        label = text[0] if len(text) == 1 else f"{len(text)} SAEs, first: {text[0]}"
        self.log.progress(self.step, f"{label} {speed:,.0f} tok/s")

    def _dead_share(self, cell: Cell) -> float:
        return float(self.comm.sum_latents(cell.dead().double().sum())) / cell.total

    def _between(self, epoch_ended: bool) -> None:
        if epoch_ended:
            for cell in self.live:
                cell.end_epoch()
        last = self.step >= self.total
        every = self.first.eval_every
        if last or (epoch_ended if every is None else self.step % every == 0):
            self._evaluate()
        if not last:
            # after the evaluation: resampling makes an SAE worse at first, and the state before it may be the best
            epoch = self.step // self.steps_per_epoch if epoch_ended else 0
            for cell in self.live:
                settings = cell.config.dead.resample
                if settings is not None and settings.due(self.step, epoch):
                    self._resample(cell)
        every = self.first.checkpoint_every
        if self._stop or (not last and (epoch_ended if every is None else self.step % every == 0)):
            self._save()
        if self._stop:
            self.log.close()
            where = (
                f"state of step {self.step} is in {self.out}"
                if self.out
                else "there is no run folder (out=), so nothing was kept"
            )
            raise TrainingInterrupted(
                f"interrupted after step {self.step} of {self.total}: {where}",
                hint="start the same command again to go on from there"
                if self.out
                else "pass out= to be able to resume",
            )

    def _resample(self, cell: Cell) -> None:
        settings = cell.config.dead.resample
        assert settings is not None
        tokens = self._prepare(data.sample(self.source, settings.tokens, cell.config.seed + self.step))
        count = dead.resample(cell, tokens, self.same_rows)
        self.resampled[cell.index] += count
        self.log.add("resample", self.step, cell.config.name, count=count, method=settings.method)

    def _evaluate(self) -> None:
        """Validate, and offer the weights to the best ones."""
        groups = [bank.live for bank in self.banks if bank.live]
        validated = {} if self.val is None else self._validate(groups, self.val)
        for cell, best in [(c, self.bests[c.index]) for c in self.live]:
            total_loss, l0, steps = self.sums[cell.index]
            values = {"train_loss": total_loss / max(steps, 1e-9), "train_l0": l0 / max(steps, 1e-9)}
            values |= validated.get(cell.index, {})
            self.sums[cell.index] = [0.0, 0.0, 0.0]
            self.log.add("eval", self.step, cell.config.name, tokens=cell.tokens, **values)
            metric = cell.config.metric or ("val_mse" if self.val is not None else "train_loss")
            if metric not in values:
                raise ConfigError(f"metric {metric} needs validation data", hint="pass val=, or set val_fraction")
            entry = {"step": self.step, "metric": metric, "value": values[metric], "values": values}
            entry |= {"threshold": cell.threshold, "tokens": cell.tokens}
            kept_in_memory = cell.config.select == "best" and cell.config.keep_best > 0
            if kept_in_memory or self.out is not None:
                best.offer(self._gathered(cell), entry)

    def validate_now(self) -> dict[str, float]:
        """Metrics of the first cell as it stands, on the validation data, or on training rows where there is none."""
        val = self.val
        if val is None:
            val = data.TensorSource(data.sample(self.source, self.first.eval_rows, self.first.data_seed))
        return self._validate([[self.cells[0]]], val)[0]

    def _validate(self, groups: list[list[Cell]], val: data.Source) -> dict[int, dict[str, float]]:
        size, limit = self.first.batch_size, self.first.eval_rows
        options = {"batch": size, "limit": limit}
        return validate.measure(groups, val, self._prepare, self.space, self.same_rows, self.crew, **options)

    def _gathered(self, cell: Cell) -> dict[str, Tensor]:
        """The weights of a cell, over all ranks that hold a share of its latents."""
        weights = export.current(cell)
        if not self.comm.splits_latents:
            return weights
        shared = ("b_dec", "b_pre")
        return {n: t if n in shared else torch.cat(self.comm.gather(t)) for n, t in weights.items()}

    def _save(self) -> None:
        if self.out is None or (self.comm.rank > 0 and not self.comm.splits_latents):
            self.comm.barrier()
            return
        state = {
            "epoch": self.epoch + (1 if self.step % self.steps_per_epoch == 0 else 0),
            "finished": self.finished,
            "space": None
            if self.space is None
            else {"mean": self.space.mean.tolist(), "std": self.space.std.tolist(), "count": self.space.count},
            "limit": self.limit,
            "sums": self.sums,
            "resampled": self.resampled,
            "first_loss": self.first_loss,
            "failed": {c.index: c.failed.message for c in self.cells if c.failed is not None},
            "best": [best.kept for best in self.bests],
            "linear": linear.decisions(),
            "source": None if self.step % self.steps_per_epoch == 0 else self.source.state_dict(),
        }
        checkpoint.save(self.out, self.cells, self.step, state, suffix=self.suffix)
        if self.comm.rank == 0:
            self.log.add("checkpoint", self.step, "")
        self.comm.barrier()

    # ---- the end ----------------------------------------------------------------------------------------

    def _finish(self) -> list[TrainResult]:
        results = []
        for cell, best, parent in zip(self.cells, self.bests, self.parents, strict=True):
            history = [line for line in self.log.lines if line["cell"] == cell.config.name]
            result = TrainResult(cell.config.name, cell.config, None, history, self.step, cell.tokens, self.out)
            results.append(result)
            if cell.failed is not None:
                result.error = cell.failed
                continue
            weights, facts = self._gathered(cell), {"threshold": cell.threshold, "tokens": cell.tokens}
            steps = self.step
            chosen = best.kept[0] if best.kept and cell.config.select == "best" else None
            values = next((line for line in reversed(history) if line["event"] == "eval"), {})
            if chosen is not None:
                weights = best.load(chosen)
                facts = {"threshold": chosen["threshold"], "tokens": chosen["tokens"]}
                values, steps = chosen["values"], chosen["step"]
                result.best = {name: chosen[name] for name in ("step", "metric", "value")}
            result.metrics = {k: v for k, v in values.items() if k.startswith(("val_", "train_"))}
            result.sae = export.to_sae(
                cell,
                self.space,
                weights,
                steps=steps,
                epochs=steps / self.steps_per_epoch,
                metrics=as_metadata(result.metrics),
                parent=None
                if parent is None
                else {"id": parent.metadata.id, "sha256": parent.metadata.provenance.weights_sha256},
                selection=f"best {chosen['metric']}, step {chosen['step']}" if chosen else "last step",
                resampled=self.resampled[cell.index],
                split=f"contiguous tail of {cell.config.val_fraction:g}" if cell.config.val_fraction else None,
                **facts,
            )
            if self.out is not None and self.comm.rank == 0 and not self.finished:
                result.write(self.out / "sae" if len(self.cells) == 1 else self.out / "sae" / cell.config.name)
        if not self.finished:
            self.finished = True
            for cell in self.live:
                self.log.add("done", self.step, cell.config.name, tokens=cell.tokens)
            self._save()
        self.log.close()
        return results

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the run after the step it is in; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self._stop:  # it came behind the last step
            where = f"everything is in {self.out}" if self.out else "its result is lost, there is no run folder (out=)"
            raise TrainingInterrupted(f"interrupted when training was done: {where}")


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Denormal moments of silent latents make fused Adam 1.35 times slower on the CPU."""
    flushed = torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(False)
