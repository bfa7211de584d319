"""Training speed against the installed trainers: same data, same initial weights, same maths, interleaved rounds.

    python benchmarks/train.py                       # the headline cases, every peer that is installed
    python benchmarks/train.py --case topk7168 --threads 1 --rounds 9
    python benchmarks/train.py --memory              # peak memory above imports and data, one process per trainer
    python benchmarks/train.py --device cuda --case h200 --precision bf16   # kernels: triton, peers under autocast

Each peer meets ours in a process of its own: five trainers in one disturb each other by factors that change each time.
Every round times a few steps of each trainer in turn; a ratio is taken within a round and the median of the rounds is
reported, by wall clock and by CPU time of the process (the steady one on a shared machine). Peers run their own model
classes, forward and loss functions and the optimiser step as their trainers do it; gradient clipping, which SAELens
and dictionary_learning add, is left out everywhere, and so are logging and data loading. No trainer renders a
verdict on another CPU: ratios are quoted with the CPU's name.

`roofline` among the peers is the least that a step can take on this machine, measured in the same rounds: the encoder's
product, and weights and Adam's moments read and written once. Its ratio is the share of the roofline that ours reaches.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / part) for part in ("", "tests")]


class Case(NamedTuple):
    """One configuration."""

    arch: str
    d: int
    n: int
    k: int
    batch: int
    dead: bool = False
    """Half of the latents count as dead, AuxK on."""
    pre_shift: float = 0.0
    """jumprelu, relu: encoder bias that sets how many latents fire."""
    l0_target: float = 0.0


CASES = {
    "topk7168": Case("topk", 896, 7168, 64, 512),
    "topk14336": Case("topk", 896, 14336, 64, 512),
    "big": Case("topk", 2048, 32768, 64, 2048),
    "batchtopk64": Case("batch_topk", 896, 7168, 64, 512),
    "batchtopk220": Case("batch_topk", 896, 7168, 220, 512),
    "jumprelu45": Case("jumprelu", 896, 7168, 0, 512, l0_target=45),
    "jumprelu700": Case("jumprelu", 896, 7168, 0, 512, l0_target=700),
    "relu": Case("relu", 896, 7168, 0, 512),
    "auxk": Case("topk", 896, 7168, 64, 512, dead=True),
    "h200": Case("topk", 4096, 65536, 64, 32768),
    "tiny": Case("topk", 16, 128, 4, 64),
}
CPU_CASES = [name for name in CASES if name not in ("h200", "tiny")]
PEERS = ("hubsae", "roofline", "textbook", "saelens", "saelens-sparse", "sparsify", "dictionary_learning")
OURS = ("hubsae",)
HEAD = f"  {'trainer':20s} {'tokens/s':>10s} {'ms wall':>9s} {'ms CPU':>9s}   times the first, by wall / by CPU"
LR = 1e-4
DEVICE, PRECISION, SEED = "cpu", "fp32", 0
"""Set by the options: where trainers run, in what precision (bf16 is ours in bf16, the peers' under autocast), and of
which data and initial weights."""
BANDWIDTH = 0.02
L0_COEFFICIENT = 1e-3


class Start(NamedTuple):
    """Initial weights, latent-major."""

    W: object
    b_enc: object
    b_dec: object
    theta: float
    data: list


def start(case: Case) -> Start:
    """Structured data (sparse sums of directions, a common mean) and a tied start, the same for all."""
    import torch

    g = torch.Generator().manual_seed(SEED)
    true = torch.randn(2 * case.d, case.d, generator=g)
    true = (true / true.norm(dim=1, keepdim=True)).to(DEVICE)

    def batch():
        which = torch.randint(0, 2 * case.d, (case.batch, 32), generator=g).to(DEVICE)
        size = torch.rand(case.batch, 32, generator=g).to(DEVICE) + 0.5
        x = torch.nn.functional.embedding_bag(which, true, per_sample_weights=size, mode="sum")
        return x + 0.1 * torch.randn(case.batch, case.d, generator=g).to(DEVICE)

    data = [batch() for _ in range(8)]
    W = torch.randn(case.n, case.d, generator=g)
    W = (W / W.norm(dim=1, keepdim=True)).to(DEVICE)
    theta = 0.0
    if case.l0_target:
        pre = (data[0][:256] - data[0].mean(0)) @ W.t()
        theta = float(torch.quantile(pre.reshape(-1)[: 1 << 20], 1 - case.l0_target / case.n))
    return Start(W, torch.zeros(case.n, device=DEVICE), data[0].mean(0), theta, data)


def make(peer: str, case: Case, s: Start) -> Callable[[int], None] | None:
    """A function that takes training step i, or None where the peer has no such architecture."""
    builder = {
        "hubsae": hubsae,
        "roofline": roofline,
        "textbook": textbook,
        "saelens": saelens,
        "saelens-sparse": lambda c, t: saelens(c, t, sparse=True),
        "sparsify": sparsify,
        "dictionary_learning": dictionary_learning,
    }[peer]
    made = builder(case, s)
    if made is None or DEVICE == "cpu":
        return made
    import torch

    dtype = torch.bfloat16 if PRECISION == "bf16" and peer not in OURS else torch.float32
    cast = torch.autocast(DEVICE, dtype=dtype, enabled=dtype is torch.bfloat16)

    def step(i: int) -> None:
        with cast:
            made(i)

    return step


def hubsae(case: Case, s: Start):
    from hubsae import kernels
    from hubsae.train import step as S
    from hubsae.train import update as U
    from hubsae.train.config import AuxConfig, DeadConfig, SparsityConfig, TrainConfig
    from hubsae.train.learn import learn
    from hubsae.train.parallel import Solo
    from hubsae.train.state import Bank

    sparsity = SparsityConfig(l0=L0_COEFFICIENT, bandwidth=BANDWIDTH) if case.arch == "jumprelu" else SparsityConfig()
    if case.arch == "relu":
        sparsity = SparsityConfig(l1=1e-3)
    config = TrainConfig(
        architecture=case.arch,
        d_sae=case.n,
        k=case.k or None,
        lr=LR,
        loss="sum",
        sparsity=sparsity,
        batch_size=case.batch,
        aux=AuxConfig(coefficient=1.0, scale_by_dead=True) if case.dead else None,
        dead=DeadConfig(tokens=10**9),
        precision=PRECISION,
        kernels="torch" if DEVICE == "cpu" else "triton",
    )
    bank = Bank([config], case.d, device=DEVICE)
    cell = bank.cells[0]
    cell.W_dec.copy_(s.W), cell.W_enc.copy_(s.W), cell.vectors["b_dec"].copy_(s.b_dec)
    if case.arch == "jumprelu":
        cell.vectors["theta"].fill_(s.theta)
    if case.dead:
        cell.since_fired[: case.n // 2] = 10**12
    solo = Solo()
    kernels.use(config.kernels)

    def step(i: int) -> None:
        x = s.data[i % len(s.data)]
        if DEVICE != "cpu":  # what the trainer does: the CUDA graph is taken here
            import torch

            with torch.no_grad():
                learn(bank, x, solo, case.batch, number=i)
            return
        f = S.forward(bank, x, solo, case.batch)
        signals = S.signals(bank, f, solo, case.batch)
        U.apply(bank, f, signals)
        if case.dead:
            cell.since_fired[: case.n // 2] = 10**12
        else:
            bank.count(signals.fired, case.batch)

    return step


def roofline(case: Case, s: Start):
    """No trainer: the encoder's product on the faster backend, and weights and moments read and written once."""
    import torch

    from hubsae.kernels.linear import fastest

    x, W, b = s.data[0], s.W, s.b_enc
    multiply = torch.nn.functional.linear
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        onednn = lambda x, W, b: torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")  # noqa: E731
        multiply = min((multiply, onednn), key=lambda way: fastest(lambda: way(x[:256], W, b)))
    if PRECISION == "bf16":
        x, W, b = (t.bfloat16() for t in (x, W, b))
    state = [torch.ones_like(s.W) for _ in range(2)]

    def step(i: int) -> None:
        multiply(x, W, b)
        for _ in range(3):  # W, m and v of two matrices
            state[0].mul_(1.0), state[1].mul_(1.0)

    return step


def textbook(case: Case, s: Start):
    import reference as R
    import torch

    if case.dead:
        return None
    P = [torch.nn.Parameter(t.clone()) for t in (s.W, s.b_enc, s.W, s.b_dec)]
    W_enc, b_enc, W_dec, b_dec = P
    log_theta = torch.nn.Parameter(torch.full((case.n,), s.theta).log()) if case.arch == "jumprelu" else None
    optimiser = torch.optim.Adam(P + ([log_theta] if log_theta is not None else []), lr=LR, fused=True)

    def step(i: int) -> None:
        x = s.data[i % len(s.data)]
        pre = (x - b_dec) @ W_enc.t() + b_enc
        penalty = 0.0
        if case.arch == "topk":
            z = R.topk_codes(pre, case.k)
        elif case.arch == "batch_topk":
            z = R.batch_topk_codes(pre, case.k)
        elif case.arch == "jumprelu":
            theta = log_theta.exp()
            z = R.jumprelu_codes(pre, theta, BANDWIDTH)
            penalty = L0_COEFFICIENT * R.l0(pre, theta, BANDWIDTH)
        else:
            z = pre.relu()
            penalty = 1e-3 * z.sum(1).mean()
        loss = (z @ W_dec + b_dec - x).square().sum(1).mean() + penalty
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            optimiser.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def saelens(case: Case, s: Start, sparse: bool = False):
    import torch
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    common = {"d_in": case.d, "d_sae": case.n, "device": DEVICE, "dtype": "float32", "apply_b_dec_to_input": True}
    coefficients = {}
    if case.arch == "topk":
        # rescale_acts_by_decoder_norm with sparse activations raises in backward on the CPU
        options = {"rescale_acts_by_decoder_norm": False, "use_sparse_activations": sparse}
        aux = {"aux_loss_coefficient": 1.0 if case.dead else 0.0}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=case.k, **common, **options, **aux))
    elif sparse:
        return None
    elif case.arch == "batch_topk":
        sae = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(k=case.k, aux_loss_coefficient=0.0, rescale_acts_by_decoder_norm=False, **common)
        )
    elif case.arch == "jumprelu":
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                jumprelu_bandwidth=BANDWIDTH, jumprelu_init_threshold=s.theta, pre_act_loss_coefficient=None, **common
            )
        )
        coefficients = {"l0": L0_COEFFICIENT}
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**common))
        coefficients = {"l1": 1e-3}
    with torch.no_grad():
        sae.W_dec.copy_(s.W), sae.W_enc.copy_(s.W.t()), sae.b_dec.copy_(s.b_dec)
    # the optimiser of its trainer, in the fused form that is a free gain
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    dead = torch.zeros(case.n, dtype=torch.bool, device=DEVICE)
    dead[: case.n // 2] = case.dead
    silent, frequency = torch.zeros(case.n, device=DEVICE), torch.zeros(case.n, device=DEVICE)

    def step(i: int) -> None:
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=s.data[i % len(s.data)],
                dead_neuron_mask=dead if case.dead else None,
                coefficients=coefficients,
                n_training_steps=i,
                is_logging_step=False,
            )
        )
        with torch.no_grad():
            fired = out.feature_acts.bool().float()
            did = fired.sum(-2).bool()
            did = did.to_dense() if did.is_sparse else did
            silent.add_(1)
            silent[did] = 0
            frequency.add_(fired.sum(0))
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def sparsify(case: Case, s: Start):
    if case.arch != "topk":
        return None
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(case.d, SparseCoderConfig(num_latents=case.n, k=case.k), device=DEVICE, dtype=torch.float32)
    with torch.no_grad():
        sae.W_dec.copy_(s.W), sae.encoder.weight.copy_(s.W), sae.encoder.bias.zero_(), sae.b_dec.copy_(s.b_dec)
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR)
    dead = torch.zeros(case.n, dtype=torch.bool, device=DEVICE)
    dead[: case.n // 2] = True
    silent = torch.zeros(case.n, dtype=torch.long, device=DEVICE)

    def step(i: int) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(s.data[i % len(s.data)], dead_mask=dead if case.dead else None)
        (out.fvu + out.auxk_loss if case.dead else out.fvu).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        did = torch.zeros(case.n, dtype=torch.bool, device=DEVICE)
        did[out.latent_indices.flatten()] = True
        silent.add_(case.batch)
        silent[did] = 0

    return step


def dictionary_learning(case: Case, s: Start):
    import torch
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.trainers.trainer import (
        remove_gradient_parallel_to_decoder_directions,
        set_decoder_norm_to_unit_norm,
    )

    common = {"steps": 10**6, "activation_dim": case.d, "dict_size": case.n, "layer": 0, "lm_name": "none"}
    common |= {"lr": LR, "warmup_steps": 0, "device": DEVICE}
    alpha = 1 / 32 if case.dead else 0.0
    with torch.no_grad():
        if case.arch in ("topk", "batch_topk"):
            kind = TopKTrainer if case.arch == "topk" else BatchTopKTrainer
            trainer = kind(k=case.k, auxk_alpha=alpha, **common)
            trainer.ae.decoder.weight.copy_(s.W.t()), trainer.ae.encoder.weight.copy_(s.W)
            weight = trainer.ae.decoder.weight
        elif case.arch == "jumprelu":
            trainer = JumpReluTrainer(
                bandwidth=BANDWIDTH,
                sparsity_penalty=L0_COEFFICIENT,
                target_l0=case.l0_target,
                sparsity_warmup_steps=None,
                **common,
            )
            trainer.ae.W_dec.copy_(s.W), trainer.ae.W_enc.copy_(s.W.t()), trainer.ae.threshold.fill_(s.theta)
            weight = trainer.ae.W_dec
        else:
            return None
        trainer.ae.b_dec.copy_(s.b_dec)
    turned = case.arch == "jumprelu"

    def step(i: int) -> None:
        if case.dead:
            trainer.num_tokens_since_fired[: case.n // 2] = 10**9
        trainer.loss(s.data[i % len(s.data)], step=i + 1).backward()
        w, g = (weight.T, weight.grad.T) if turned else (weight, weight.grad)
        g = remove_gradient_parallel_to_decoder_directions(w, g, case.d, case.n)
        weight.grad = g.T if turned else g
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.scheduler.step()
        w = set_decoder_norm_to_unit_norm(weight.T if turned else weight, case.d, case.n)
        weight.data = w.T if turned else w

    return step


def cpu_name() -> str:
    """The CPU, as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        family = next(line.split(":")[1].strip() for line in lines if line.startswith("cpu family"))
        return f"{names[0]} (family {family}), {len(names)} cores"
    except (OSError, IndexError, StopIteration):
        return platform.processor() or "unknown CPU"


def clock() -> float:
    """Seconds, when the device has done what it was given."""
    if DEVICE != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def compare(case: Case, peers: list[str], rounds: int, steps: int) -> None:
    """Interleaved rounds of every trainer; prints tokens/s and ratios to the first."""
    s = start(case)
    runs: dict[str, Callable[[int], None]] = {}
    for peer in peers:
        try:
            made = make(peer, case, s)
        except ImportError as error:
            print(f"  {peer}: not installed ({error})")
            continue
        if made is not None:
            for i in range(2 if DEVICE == "cpu" else 6):  # a GPU's kernels are compiled, its graph is taken
                made(i)
            runs[peer] = made
    wall: dict[str, list[float]] = {peer: [] for peer in runs}
    cpu: dict[str, list[float]] = {peer: [] for peer in runs}
    for _ in range(rounds):
        for peer, run in runs.items():
            run(2)  # the caches are another trainer's
            w, c = clock(), time.process_time()
            for i in range(steps):
                run(3 + i)
            wall[peer].append((clock() - w) / steps)
            cpu[peer].append((time.process_time() - c) / steps)
    for peer in runs:
        w, c = statistics.median(wall[peer]), statistics.median(cpu[peer])
        by_wall = statistics.median(b / a for a, b in zip(wall[peers[0]], wall[peer], strict=True))
        by_cpu = statistics.median(b / a for a, b in zip(cpu[peers[0]], cpu[peer], strict=True))
        print(f"  {peer:20s} {case.batch / w:10,.0f} {w * 1e3:9.2f} {c * 1e3:9.2f}   {by_wall:6.2f} / {by_cpu:.2f}")
    sys.stdout.flush()


def peak(peer: str, case: Case) -> float | None:
    """MB at the peak of four steps above imports and data; run in a process of its own."""
    modules = {"sparsify": "sparsify", "dictionary_learning": "dictionary_learning.trainers.top_k"}
    modules |= {"saelens": "sae_lens.saes.topk_sae", "saelens-sparse": "sae_lens.saes.topk_sae"}
    importlib.import_module(modules.get(peer, "hubsae.train"))
    s = start(case)
    tiny = CASES["tiny"]
    if (warm := make(peer, tiny, start(tiny))) is not None:
        warm(0)  # code that is loaded at its first use counts as an import
    if DEVICE != "cpu":
        return _peak_on_gpu(peer, case, s)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; ru_maxrss would start at the parent's peak
    before = _high_water("VmRSS")
    run = make(peer, case, s)
    if run is None:
        return None
    for i in range(4):
        run(i)
    return _high_water("VmHWM") - before


def _peak_on_gpu(peer: str, case: Case, s: Start) -> float | None:
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if (run := make(peer, case, s)) is None:
        return None
    for i in range(8):
        run(i)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _high_water(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--peer", action="append", choices=PEERS)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")) or None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps at the tiny case")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--ours", choices=OURS, default="hubsae", help="the trainer that the others are compared with")
    parser.add_argument("--together", action="store_true", help="all trainers in this process, which disturbs them all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="with --device cuda")
    parser.add_argument("--seed", type=int, default=0, help="of data and initial weights")
    parser.add_argument("--one", nargs=2, metavar=("PEER", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.precision == "bf16" and options.device == "cpu":
        parser.error("--precision bf16 needs --device cuda: peers stay in float32 here")
    global DEVICE, PRECISION, SEED
    DEVICE, PRECISION, SEED = options.device, options.precision, options.seed
    where = ["--device", DEVICE, "--precision", PRECISION, "--seed", str(SEED)]
    if options.one:
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        torch.set_flush_denormal(True)
        value = peak(options.one[0], CASES[options.one[1]])
        print("none" if value is None else f"{value:.0f}")
        return
    peers = [p for p in options.peer or PEERS if p != options.ours and not (options.memory and p == "roofline")]
    cases = options.case or (["tiny"] if options.quick else CPU_CASES if DEVICE == "cpu" else ["h200"])
    print(f"{cpu_name()}; python {platform.python_version()}", flush=True)
    if DEVICE == "cuda":
        import torch

        print(f"{torch.cuda.get_device_name()}, {PRECISION}", flush=True)
    if options.memory:
        for name in cases:
            print(f"\n{name}: peak MB above imports and data")
            for peer in [options.ours, *peers]:
                extra = ["--threads", str(options.threads)] if options.threads else []
                command = [sys.executable, __file__, "--one", peer, name, *extra, *where]
                done = subprocess.run(command, capture_output=True, text=True)
                text = done.stdout.strip().splitlines()
                print(f"  {peer:20s} {text[-1] if done.returncode == 0 and text else 'failed: ' + done.stderr[-200:]}")
        return
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    rounds, steps = (2, 2) if options.quick else (options.rounds, options.steps)
    if not options.together:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for name in cases:
        if options.together:
            compare(CASES[name], [options.ours, *peers], rounds, steps)
            continue
        case = CASES[name]
        about = f"{case.arch} d={case.d} n={case.n} k={case.k} batch={case.batch}" + " half dead, AuxK" * case.dead
        print(f"\n{name}: {about}; load {os.getloadavg()[0]:.1f}\n{HEAD}", flush=True)
        for peer in peers:
            command = [sys.executable, __file__, "--together", "--case", name, "--ours", options.ours, "--peer", peer]
            command += ["--threads", str(torch.get_num_threads()), "--rounds", str(rounds), "--steps", str(steps)]
            command += where
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.splitlines()
            print(
                "\n".join(line for line in lines if line.startswith("  ")) or f"  {peer} failed: {done.stderr[-300:]}"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
