"""The trainer learns, converts exactly, and says clearly what is wrong."""

import json
import resource

import numpy as np
import pytest
import torch

import hubsae.train.checkpoint as checkpoint
from hubsae.activations import ActivationDataset
from hubsae.activations.activation_set import Batch
from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, DataError, TrainingError, WriteError
from hubsae.hub.sae import HubSAE
from hubsae.train import (
    AuxConfig,
    DeadConfig,
    InitConfig,
    ResampleConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
    step,
    train,
    update,
)
from hubsae.train import dead as dead_latents
from hubsae.train.data import TensorSource
from hubsae.train.init import geometric_median
from hubsae.train.parallel import Solo
from hubsae.train.schedule import learning_rate, sparsity_scale
from hubsae.train.trainer import Run

ARCHITECTURES = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4},
    "jumprelu": {"sparsity": SparsityConfig(l0=1e-3, bandwidth=0.05), "loss": "sum"},
    "relu": {"sparsity": SparsityConfig(l1=1e-2), "loss": "sum"},
    "gated": {"sparsity": SparsityConfig(l1=1e-2), "loss": "sum"},
}


def config(architecture: str = "topk", **values) -> TrainConfig:
    base = {"d_sae": 96, "batch_size": 128, "lr": 2e-3, "epochs": 2, **ARCHITECTURES[architecture]}
    return TrainConfig(architecture=architecture, **{**base, **values})


@pytest.mark.parametrize("normalize", ["none", "mean_std", "center_scalar", "scalar"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_training_reduces_the_error_and_the_folded_sae_gives_it(architecture, normalize, tokens, held_out):
    result = train(config(architecture, normalize=normalize, log_every=1), tokens, val=held_out)
    first = next(line["loss"] for line in result.history if line["event"] == "train")
    assert result.sae is not None and result.steps == 64 and result.tokens == 64 * 128
    assert result.metrics["val_fvu"] < 0.6
    assert result.last("loss", "train") < 0.9 * first
    # what the trainer measured in its own space is what the folded SAE does on raw activations
    mse = float((result.sae(held_out) - held_out).square().mean())
    assert mse == pytest.approx(result.metrics["val_mse"], rel=1e-4)
    z = result.sae.encode(held_out)
    assert 1 - float((z != 0).any(0).double().mean()) == pytest.approx(result.metrics["val_dead"], abs=1e-9)
    assert float((z != 0).sum(1).double().mean()) == pytest.approx(result.metrics["val_l0"], rel=1e-9)
    if architecture == "batch_topk":
        assert result.sae.config.threshold is not None and result.metrics["val_l0"] == pytest.approx(4, rel=0.1)


def test_untied_bias_without_relu_folds_exactly(tokens, held_out):
    c = config(topk_relu=False, pre_bias="untied", init=InitConfig(encoder="torch", decoder="torch"))
    result = train(c, tokens, val=held_out)
    assert result.sae is not None and result.sae.config.topk_relu is False
    mse = float((result.sae(held_out) - held_out).square().mean())
    assert mse == pytest.approx(result.metrics["val_mse"], rel=1e-4)


def test_metadata_tells_how_it_was_trained(tokens):
    c = config(val_fraction=0.125, record={"hook": {"layer": 3}}, clip=1.0, aux=AuxConfig(k=4), name="layer3")
    sae = train(c, tokens).sae
    assert sae is not None
    t = sae.metadata.training
    assert (t.tokens, t.steps, t.batch_size, t.seed, t.lr) == (56 * 128 - 56 * 128 % 128, 56, 128, 0, 2e-3)
    assert sae.metadata.hook.layer == 3 and "AuxK" in (t.aux_loss or "") and "clipped at 1" in (t.optimizer or "")
    metric = next(m for m in sae.metadata.metrics if m.name == "mse")
    assert metric.n_tokens == 512 and metric.scope == sae.metadata.own_scope == "all"


def test_2000_steps_reach_the_dense_reference_on_known_features():
    """The headline parity: same data, same start, FVU within 0.5 % and the same dead share."""
    from train import dense

    data = tokens_for_parity()
    c = config(d_sae=128, epochs=125, lr=1e-3, batch_size=256, log_every=10**6)
    run = Run([c], data)
    other = dense.DenseTrainer(run.cells[0])
    order = [x for epoch in range(125) for x in run.source.batches(256, seed=0, epoch=epoch)]
    (result,) = run.fit()
    assert result.steps == 2000 and result.sae is not None
    for x in order:
        other.step(x)
    P = {k: v.detach() for k, v in other.params.items()}
    theirs = HubSAE(
        SAEConfig(architecture="topk", d_in=16, d_sae=128, k=4),
        {"W_enc": P["W_enc"].t().contiguous(), "b_enc": P["b_enc"], "W_dec": P["W_dec"], "b_dec": P["b_dec"]},
    )
    fvu, deads = [], []
    spread = (data - data.mean(0)).square().sum()
    for sae in (result.sae, theirs):
        fvu.append(float((sae(data) - data).square().sum() / spread))
        deads.append(float((sae.encode(data) == 0).all(0).double().mean()))
    assert fvu[0] == pytest.approx(fvu[1], rel=0.005)
    assert deads[0] == pytest.approx(deads[1], abs=0.02)


def tokens_for_parity() -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(48, 16, generator=g), dim=1)
    strength = (torch.rand(4096, 48, generator=g) + 0.5) * (torch.rand(4096, 48, generator=g) < 0.06)
    return strength @ directions + 0.3


def test_accumulated_parts_equal_the_whole_batch(tokens):
    whole, parts = (train(config(accumulate=a, clip=None, log_every=8), tokens).sae for a in (1, 4))
    assert whole is not None and parts is not None
    assert float((whole.W_dec - parts.W_dec).abs().max()) < 1e-4


def test_accumulated_parts_count_dead_latents_once_per_step(tokens):
    def run(parts: int) -> Run:
        aux, dead = AuxConfig(k=16, coefficient=1.0), DeadConfig(tokens=400)
        out = Run([config(d_sae=256, k=2, accumulate=parts, aux=aux, dead=dead, epochs=2)], tokens)
        out.fit()
        return out

    whole, parts = run(1), run(4)
    assert bool(whole.cells[0].dead().any())  # AuxK had something to do
    assert torch.equal(whole.cells[0].since_fired, parts.cells[0].since_fired)
    assert float((whole.bank.W_dec - parts.bank.W_dec).abs().max()) < 1e-4


def test_bf16_autocast_trains(tokens, held_out):
    result = train(config(precision="bf16"), tokens, val=held_out)
    assert result.metrics["val_fvu"] < 0.6


def test_tokens_of_massive_norm_are_left_out(tokens, held_out):
    spiked = tokens.clone()
    spiked[::16] *= 500
    result = train(config(max_norm_factor=10.0), spiked, val=spiked[:1024])
    assert result.tokens < result.steps * 128 and result.sae is not None
    # the validation leaves the same tokens out of the errors and of the variance
    x = spiked[:1024][spiked[:1024].norm(dim=1) < 100]
    errors, spread = (result.sae(x) - x).square().sum(), (x - x.mean(0)).square().sum()
    assert result.metrics["val_fvu"] == pytest.approx(float(errors / spread), rel=1e-4)
    assert 0.05 < result.metrics["val_fvu"] < 0.6 and result.metrics["val_rows"] == len(x)
    training = result.sae.metadata.training
    assert training.exclude == ["massive"] and training.massive_above is not None
    metric = next(m for m in result.sae.metadata.metrics if m.name == "fvu")
    assert metric.scope == result.sae.metadata.own_scope == "not massive"


def test_groups_of_tokens_are_left_out_by_name(tokens):
    role = np.array(["user", "assistant"])[np.arange(4096) % 2]
    position = np.arange(4096) % 8
    spiked = tokens.clone()
    spiked[position == 0] += 300
    data = ActivationDataset.from_tensor(spiked, position=position, role=role)
    result = train(config(exclude=("position_0", "role=user"), normalize="mean_std"), data, val=data)
    assert result.sae is not None and result.sae.metadata.own_scope == "not position_0 & not role=user"
    x = spiked[(position != 0) & (role != "user")]
    assert result.metrics["val_rows"] == len(x) and result.tokens == 4096
    assert result.sae.normalizer is not None
    torch.testing.assert_close(result.sae.normalizer.mean, x.mean(0), rtol=1e-4, atol=1e-4)
    errors, spread = (result.sae(x) - x).square().sum(), (x - x.mean(0)).square().sum()
    assert result.metrics["val_fvu"] == pytest.approx(float(errors / spread), rel=1e-4)
    with pytest.raises(ConfigError, match="needs the label columns position"):
        train(config(exclude=("position_0",)), tokens)
    with pytest.raises(ConfigError, match="needs the label columns is_special"):
        train(config(exclude=("special",)), data)


# ---- dead latents ------------------------------------------------------------------------------------------


def test_the_state_before_a_resampling_is_a_candidate_for_the_best(tokens):
    c = config(
        epochs=2,
        dead=DeadConfig(rule="frequency", frequency=1e-3, resample=ResampleConfig(every_epochs=1, tokens=512)),
    )
    events = [line["event"] for line in train(c, tokens, val=tokens[:512], quiet=True).history]
    assert "resample" in events
    assert events.index("eval") < events.index("resample")


def test_frequency_rule_marks_latents_of_the_last_epoch_and_resampling_revives_them(tokens):
    c = config(
        epochs=6,
        d_sae=512,
        k=2,
        init=InitConfig(bias="zeros"),
        dead=DeadConfig(rule="frequency", frequency=1e-3, resample=ResampleConfig(every_epochs=2, tokens=512)),
    )
    result = train(c, tokens)
    events = [line for line in result.history if line["event"] == "resample"]
    assert [e["step"] for e in events] == [64, 128]  # after epochs 2 and 4, not after the last
    assert events[0]["count"] > 0
    assert result.sae is not None and "resampled" in (result.sae.metadata.training.resampling or "")


@pytest.mark.parametrize("method", ["worst_tokens", "anthropic"])
def test_resampling_does_what_its_description_says(method, tokens):
    c = config(dead=DeadConfig(tokens=100, resample=ResampleConfig(method=method, tokens=256)))
    run = Run([c], tokens)
    cell = run.cells[0]
    with torch.no_grad():
        cell.vectors["b_enc"].fill_(0.3)
        cell.since_fired[:10] = 1000
        for matrix in (cell.m_enc, cell.v_dec):
            matrix.fill_(1.0)
        before = cell.W_enc.clone()
        assert dead_latents.resample(cell, Batch(tokens[:256], {}), Solo()) == 10
    torch.testing.assert_close(cell.W_dec[:10].norm(dim=1), torch.ones(10))
    assert (cell.vectors["b_enc"][:10] == 0).all() and (cell.vectors["b_enc"][10:] == 0.3).all()
    assert torch.equal(cell.W_enc[10:], before[10:]) and not cell.dead().any()
    kept = method == "worst_tokens"  # the optimiser's state
    assert bool((cell.m_enc[:10] == 1).all()) == kept and bool((cell.v_dec[:10] == 1).all()) == kept
    norm = 1.0 if kept else 0.2 * float(before[10:].norm(dim=1).mean())
    torch.testing.assert_close(cell.W_enc[:10].norm(dim=1), torch.full((10,), norm))
    if kept:
        units = tokens[:256] / tokens[:256].norm(dim=1, keepdim=True)
        assert float((cell.W_dec[:10] @ units.t()).max(1).values.min()) > 0.9999


@pytest.mark.parametrize("aux", [None, AuxConfig(k=32)])
def test_dead_latents_move_only_with_auxk(aux, tokens):
    run = Run([config(d_sae=512, k=2, dead=DeadConfig(tokens=1000), aux=aux)], tokens)
    cell = run.cells[0]
    cell.since_fired[:100] = 10**6
    before = cell.W_dec[:100].clone()
    x = next(iter(run.source.batches(128)))
    with torch.no_grad():
        cell.vectors["b_enc"][:100] = -0.2
        f = step.forward(run.bank, x, Solo(), 128)
        chosen = f.entries.offsets.diff()[:100] > 0
        update.apply(run.bank, f, step.signals(run.bank, f, Solo(), 128))
    moved = ((cell.W_dec[:100] - before).abs() > 1e-5).any(1)  # norming a unit row again moves its last bit
    assert bool((moved & ~chosen).any()) == (aux is not None)


def test_triton_kernels_where_there_is_no_triton_say_where_it_comes_from(tokens, monkeypatch):
    monkeypatch.setattr("hubsae.train.trainer.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="kernels: triton needs the package triton") as error:
        train(config(kernels="triton"), tokens)
    assert "kernels: torch runs everywhere" in str(error.value)


class OwnSource:
    """A source of one's own, with what the page on training asks for and nothing more."""

    def __init__(self, rows: torch.Tensor, *names: str):
        inner = TensorSource(rows)
        for name in names or ("d", "n_rows", "batches", "state_dict", "load_state_dict", "take"):
            setattr(self, name, getattr(inner, name))


def test_a_source_of_ones_own_trains_as_the_rows_that_it_gives(tokens, held_out):
    c = config(epochs=1, normalize="mean_std")
    own, rows = train(c, OwnSource(tokens), val=OwnSource(held_out)), train(c, tokens, val=held_out)
    assert own.sae is not None and rows.sae is not None
    assert all(torch.equal(own.sae.tensors()[name], tensor) for name, tensor in rows.sae.tensors().items())
    assert own.metrics["val_mse"] == pytest.approx(rows.metrics["val_mse"])
    with pytest.raises(DataError, match="cannot train on OwnSource"):
        train(c, OwnSource(tokens, "d", "n_rows", "batches", "state_dict", "load_state_dict"))


# ---- schedules and starts ----------------------------------------------------------------------------------


def test_schedules():
    def rates(**s):
        c = config(lr=1.0, schedule=ScheduleConfig(**s))
        return [round(learning_rate(c, step, 100), 4) for step in (0, 4, 9, 10, 55, 99)]

    assert rates() == [1, 1, 1, 1, 1, 1]
    assert rates(warmup_steps=10) == [0.1, 0.5, 1, 1, 1, 1]
    assert rates(warmup_tokens=1280) == [0.1, 0.5, 1, 1, 1, 1]
    assert rates(shape="cosine", floor=0.1, warmup_steps=10)[3:5] == [1.0, 0.55]
    assert rates(shape="linear")[-1] == 0.01
    assert rates(shape="cosine", floor=0.1, warmup_steps=10, cooldown_steps=20)[3:] == [1.0, 0.3548, 0.005]
    assert rates(cooldown_steps=20)[4:] == [1, 0.05]
    c = config("relu", sparsity=SparsityConfig(l1=1.0, warmup_tokens=1280))
    assert [sparsity_scale(c, s) for s in (0, 5, 10, 11)] == [0, 0.5, 1, 1]


def test_a_cosine_with_warm_up_and_cool_down_is_what_saelens_puts_together_of_torchs():
    from torch.optim import lr_scheduler as of_torch

    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=7e-5)
    parts = [
        of_torch.LinearLR(optimizer, 1 / 16, 1.0, total_iters=15),
        of_torch.CosineAnnealingLR(optimizer, T_max=240, eta_min=7e-6),
        of_torch.LinearLR(optimizer, 0.1, 0.0, total_iters=64),
    ]
    theirs = of_torch.SequentialLR(optimizer, parts, milestones=[16, 256])
    schedule = ScheduleConfig(shape="cosine", floor=0.1, warmup_steps=16, cooldown_steps=64)
    c = config(lr=7e-5, schedule=schedule)
    for at in range(320):
        assert learning_rate(c, at, 320) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), at
        optimizer.step()
        theirs.step()


def test_geometric_median_ignores_outliers():
    x = torch.randn(501, 4, generator=torch.Generator().manual_seed(0))
    x[:50] += 1000
    assert float(geometric_median(x).norm()) < 0.5 and float(x.mean(0).norm()) > 50


@pytest.mark.parametrize("normalize", ["none", "mean_std"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_warm_start_begins_as_the_same_function(architecture, normalize, tokens, held_out):
    parent = train(config(architecture, normalize=normalize), tokens, val=held_out).sae
    assert parent is not None
    for pre_bias in ("tied", "none", "untied"):
        run = Run([config(architecture, normalize=normalize, pre_bias=pre_bias)], tokens, starts=[parent], val=held_out)
        with torch.no_grad():
            now = run.validate_now()
        assert now["val_mse"] == pytest.approx(parent.metadata.metric("mse"), rel=2e-3)
        assert float(run.bank.m_enc.abs().max()) == 0  # a fresh optimiser


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_folded_sae_is_the_same_function_before_and_after_a_step_of_no_length(architecture, tokens, held_out):
    """Folded decoder rows have norms of their own; a selection among codes in other units would be another one."""
    g = torch.Generator().manual_seed(1)
    wide = tokens * torch.logspace(-1, 1, 32)
    parent = train(config(architecture, normalize="mean_std", epochs=1), wide, val=held_out).sae
    assert parent is not None and float((parent.W_dec.norm(dim=1) - 1).abs().max()) > 0.5
    parent.normalizer = None  # as read from a file that keeps no statistics
    x = wide[torch.randperm(4096, generator=g)[:512]]
    expected = float((parent(x) - x).square().mean())
    c = config(architecture, lr=1e-12, tokens=128, select="last", sparsity=SparsityConfig())
    run = Run([c], wide, starts=[parent], val=x)
    with torch.no_grad():
        assert run.validate_now()["val_mse"] == pytest.approx(expected, rel=1e-4)
    (result,) = run.fit()
    tolerance = 0.05 if architecture == "batch_topk" else 1e-4  # the threshold is taken anew
    assert result.metrics["val_mse"] == pytest.approx(expected, rel=tolerance)


def test_warm_start_from_a_pt_file_of_the_chain_layout(tmp_path, tokens, held_out):
    d, n = 32, 96
    g = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(d, n, generator=g), dim=0)
    state = {
        "b_pre": tokens.mean(0),
        "encoder.weight": decoder.t().contiguous(),
        "encoder.bias": torch.zeros(n),
        "decoder.weight": decoder,
        "decoder.bias": tokens.mean(0),
    }
    settings = {"d_model": d, "d_sae": n, "k": 4, "seed": 0, "source_kind": "split"}
    path = tmp_path / "sae_ppo_step10_layer6.pt"
    torch.save({"state_dict": state, "config": settings}, path)
    x = held_out
    values, where = ((x - state["b_pre"]) @ decoder).topk(4)
    expected = torch.zeros(len(x), n).scatter(1, where, values) @ decoder.t() + state["decoder.bias"]
    run = Run([config(topk_relu=False)], tokens, starts=[str(path)], val=held_out)
    with torch.no_grad():
        assert run.validate_now()["val_mse"] == pytest.approx(float((expected - x).square().mean()), rel=1e-4)
    assert train(config(topk_relu=False), tokens, init=str(path), val=held_out).metrics["val_fvu"] < 0.6


# ---- what can go wrong -------------------------------------------------------------------------------------


def test_clear_errors_before_anything_starts(tokens, tmp_path):
    with pytest.raises(ConfigError, match=r"k=200 is larger than d_sae=96"):
        train(config(d_sae=None, expansion=3, k=200), tokens)
    with pytest.raises(ValueError, match="k=200 is larger than d_sae=96"):
        config(k=200)
    with pytest.raises(ConfigError, match="batch_size 128 is larger than the data"):
        train(config(), tokens[:100])
    with pytest.raises(DataError, match="must be a matrix"):
        train(config(), tokens.reshape(4, 1024, 32))
    with pytest.raises(DataError, match="validation activations have width 8"):
        train(config(), tokens, val=torch.randn(64, 8))
    wrong = HubSAE.random(SAEConfig(architecture="topk", d_in=16, d_sae=96, k=4))
    with pytest.raises(ConfigError, match="d_in 16 instead of 32"):
        train(config(), tokens, init=wrong, out=tmp_path / "run")
    assert not (tmp_path / "run" / "state").exists()


def test_nan_in_the_data_names_the_row_and_the_last_good_state(tokens, tmp_path):
    bad = tokens.clone()
    bad[4000, 3] = float("nan")
    c = config(init=InitConfig(bias="zeros", rows=16), checkpoint_every=1)
    with pytest.raises(DataError, match=r"row \d+ of the batch holds NaN") as caught:
        train(c, bad, out=tmp_path)
    state = checkpoint.latest(tmp_path / "state")
    if state is not None:
        assert state.name in str(caught.value)
    with pytest.raises(DataError, match="hold NaN or infinity"):
        train(config(), bad)  # found by the start, which looks at the mean


def test_an_exploding_loss_stops_with_the_last_good_checkpoint(tokens, tmp_path):
    c = config(lr=1e12, unit_norm=False, checkpoint_every=1)
    with pytest.raises(TrainingError, match="the loss became") as caught:
        train(c, tokens, out=tmp_path)
    state = checkpoint.latest(tmp_path / "state")
    assert state is not None and state.name in str(caught.value)


def test_a_write_that_fails_is_one_error_and_loses_nothing(tokens, tmp_path):
    real = checkpoint.save

    def full_at_30(run, cells, step, state, **options):
        # the operating system refuses more than 20 kB, as it does on a full disk: safetensors says so in its own type
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if step == 30 else limits[0], limits[1]))
        try:
            return real(run, cells, step, state, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", full_at_30)
        with pytest.raises(WriteError, match=r"state/step_00000030: .*File too large.*needs \d+.* free") as caught:
            train(config(checkpoint_every=10), tokens, out=tmp_path)
    assert "step_00000020 is whole" in str(caught.value)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step_00000020"]
    resumed, whole = train(config(checkpoint_every=10), tokens, out=tmp_path).sae, train(config(), tokens).sae
    assert resumed is not None and whole is not None and torch.equal(resumed.W_dec, whole.W_dec)


def test_another_configuration_in_the_same_folder_is_refused(tokens, tmp_path):
    train(config(), tokens, out=tmp_path)
    with pytest.raises(ConfigError, match=r"sae\.lr"):
        train(config(lr=1e-3), tokens, out=tmp_path)
    train(config(lr=1e-3), tokens, out=tmp_path, resume=False)


# ---- what a run leaves -------------------------------------------------------------------------------------


def test_run_folder_holds_log_best_checkpoints_and_exports(tokens, tmp_path):
    c = config(epochs=5, keep_best=2, val_fraction=0.125, exports=("safetensors", "pt"), log_every=10)
    result = train(c, tokens, out=tmp_path)
    best = sorted((tmp_path / "best" / "sae").glob("*.json"))
    assert len(best) == 2
    values = [json.loads(p.read_text())["value"] for p in best]
    evals = [line["val_mse"] for line in result.history if line["event"] == "eval"]
    assert sorted(values) == sorted(evals)[:2] and result.best is not None and result.best["value"] == min(evals)
    again = HubSAE.from_pretrained(tmp_path / "sae")
    assert result.sae is not None and torch.equal(again.W_enc, result.sae.W_enc)
    assert (tmp_path / "sae" / "model.pt").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"train", "eval", "checkpoint", "done"} <= {line["event"] for line in lines}
    assert (tmp_path / "log.csv").read_text().startswith("event,step,cell")


def test_a_finished_run_is_not_trained_again(tokens, tmp_path):
    first = train(config(), tokens, out=tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    second = train(config(), tokens, out=tmp_path)
    assert first.sae is not None and second.sae is not None and torch.equal(first.sae.W_enc, second.sae.W_enc)
    assert (tmp_path / "log.jsonl").read_text() == log and second.metrics == first.metrics
