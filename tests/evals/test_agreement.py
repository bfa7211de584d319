"""The same model, SAE and tokens in the peers' own code: equal to 1e-6 where the definitions coincide.

Where they do not, the test computes the peer's number from ours, so that the table in docs/metrics.md is known
to name the only difference.
"""

import sys
import types
import warnings

import pytest
import torch

from hubsae import evals
from hubsae.core.hooks import read_hook

HOOK = "model.layers.1"
CLOSE = {"rel": 1e-6, "abs": 1e-6}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 96, (6, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae()


@pytest.fixture(scope="module")
def x(qwen, ids):
    seen = []
    with torch.no_grad(), read_hook(qwen, HOOK, lambda h: seen.append(h.reshape(-1, h.shape[-1]))):
        qwen(input_ids=ids)
    return seen[0]


@pytest.fixture(scope="module")
def ours(sae, x):
    return evals.reconstruction({"sae": sae}, x)["sae"]


@pytest.fixture(scope="module")
def spliced(qwen, sae, ids):
    return evals.splice(qwen, None, sae, HOOK, ids)


class Tokens:
    """What SAELens and SAEBench ask of an activation store: the next tokens."""

    normalize_activations = "none"

    def __init__(self, ids):
        self.rows = list(ids)

    def get_batch_tokens(self, n):
        out, self.rows = self.rows[:n], self.rows[n:]
        return torch.stack(out)


@pytest.fixture(scope="module")
def proxy(qwen):
    """SAELens' own wrapper of a transformers model."""
    pytest.importorskip("sae_lens")
    from sae_lens.load_model import HookedProxyLM

    return HookedProxyLM(qwen, types.SimpleNamespace(pad_token_id=0, bos_token_id=0, eos_token_id=0))


# ---- SAELens ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lens(sae):
    pytest.importorskip("sae_lens")
    made = sae.to_saelens()
    made.cfg.metadata.hook_name, made.cfg.metadata.hook_head_index = HOOK, None
    return made


@pytest.fixture(scope="module")
def saelens_metrics(lens, proxy, ids):
    from sae_lens.evals import get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    arguments = (1, True, True, True, True, 6, {})
    return get_sparsity_and_variance_metrics(lens, proxy, Tokens(ids), ActivationScaler(), *arguments)


def test_saelens_reconstruction(saelens_metrics, ours):
    theirs, features = saelens_metrics
    assert ours.value("fve") == pytest.approx(theirs["explained_variance"], **CLOSE)
    assert ours.value("cosine") == pytest.approx(theirs["cossim"], **CLOSE)
    assert ours.value("l2_ratio") == pytest.approx(theirs["l2_ratio"], **CLOSE)
    assert ours.value("relative_bias") == pytest.approx(theirs["relative_reconstruction_bias"], **CLOSE)
    assert ours.value("l0") == pytest.approx(theirs["l0"], **CLOSE)
    assert ours.value("l1") == pytest.approx(theirs["l1"], **CLOSE)
    assert ours.features.density.tolist() == pytest.approx(features["feature_density"], **CLOSE)


def test_saelens_mse_is_ours_times_the_width(saelens_metrics, ours):
    assert saelens_metrics[0]["mse"] == pytest.approx(ours.value("mse") * 32, **CLOSE)


def test_saelens_legacy_explained_variance_is_a_mean_of_ratios(saelens_metrics, ours, sae, x):
    e = (x - sae(x)).double().square().sum(1)
    spread = (x.double() - x.double().mean(0)).square().sum(1)
    legacy = float((1 - e / spread).mean())
    assert saelens_metrics[0]["explained_variance_legacy"] == pytest.approx(legacy, **CLOSE)
    assert abs(legacy - ours.value("fve")) > 1e-3


def test_saelens_downstream(lens, proxy, ids, spliced):
    from sae_lens.evals import get_downstream_reconstruction_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    theirs = get_downstream_reconstruction_metrics(lens, proxy, Tokens(ids), ActivationScaler(), True, True, 2, 3)
    assert spliced.value("ce_clean") == pytest.approx(theirs["ce_loss_without_sae"], **CLOSE)
    assert spliced.value("ce_sae") == pytest.approx(theirs["ce_loss_with_sae"], **CLOSE)
    assert spliced.value("ce_zero") == pytest.approx(theirs["ce_loss_with_ablation"], **CLOSE)
    assert spliced.value("frac_recovered_zero") == pytest.approx(theirs["ce_loss_score"], rel=5e-6)
    # their KL also counts the last position, whose prediction is never tested
    assert abs(theirs["kl_div_with_sae"] - spliced.value("kl")) > 1e-4


def test_saelens_kl_without_the_last_position(lens, proxy, ids, spliced):
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler

    theirs = get_recons_loss(lens, proxy, ActivationScaler(), ids, compute_kl=True, compute_ce_loss=False)
    assert spliced.value("kl") == pytest.approx(float(theirs["kl_div_with_sae"][:, :-1].mean()), **CLOSE)
    assert spliced.value("kl_zero") == pytest.approx(float(theirs["kl_div_with_ablation"][:, :-1].mean()), **CLOSE)


# ---- SAEBench ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saebench(sae):
    """SAEBench's core evaluation. It was written for an older SAELens, whose module names it imports."""
    pytest.importorskip("sae_bench")
    import sae_lens
    import sae_lens.loading.pretrained_saes_directory as directory

    moved = {
        "sae_lens.sae": {"SAE": sae_lens.SAE},
        "sae_lens.toolkit": {},
        "sae_lens.toolkit.pretrained_saes_directory": vars(directory),
    }
    added = [name for name in moved if name not in sys.modules]
    for name in added:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update({k: v for k, v in moved[name].items() if not k.startswith("__")})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from sae_bench.evals.core import main
    finally:
        for name in added:
            del sys.modules[name]
    config = types.SimpleNamespace(hook_name=HOOK, hook_head_index=None, hook_layer=1)
    wrapped = types.SimpleNamespace(cfg=config, device=torch.device("cpu"), encode=sae.encode, decode=sae.decode)
    wrapped.cfg.d_sae = sae.d_sae
    return main, wrapped


def test_saebench_core(saebench, proxy, ids, ours, spliced):
    main, wrapped = saebench
    down = main.get_downstream_reconstruction_metrics(wrapped, proxy, Tokens(ids), True, True, 2, 3)
    assert spliced.value("ce_clean") == pytest.approx(down["ce_loss_without_sae"], **CLOSE)
    assert spliced.value("ce_sae") == pytest.approx(down["ce_loss_with_sae"], **CLOSE)
    assert spliced.value("ce_zero") == pytest.approx(down["ce_loss_with_ablation"], **CLOSE)
    theirs, _ = main.get_sparsity_and_variance_metrics(wrapped, proxy, Tokens(ids), 1, True, True, True, True, 6, {})
    for name, metric in {
        "cossim": "cosine",
        "l2_ratio": "l2_ratio",
        "l0": "l0",
        "l1": "l1",
        "relative_reconstruction_bias": "relative_bias",
    }.items():
        assert ours.value(metric) == pytest.approx(theirs[name], **CLOSE), name


def test_saebench_explained_variance_subtracts_mean_squares_and_mse_divides_twice(saebench, proxy, ids, ours, x):
    main, wrapped = saebench
    arguments = (True, True, True, True)
    whole, _ = main.get_sparsity_and_variance_metrics(wrapped, proxy, Tokens(ids), 1, *arguments, 6, {})
    halves, _ = main.get_sparsity_and_variance_metrics(wrapped, proxy, Tokens(ids), 2, *arguments, 3, {})
    n, d = x.shape
    assert whole["mse"] == pytest.approx(ours.value("mse") * d / n, **CLOSE)
    assert halves["mse"] == pytest.approx(2 * whole["mse"], rel=1e-5)
    wide = x.double()
    total = wide.square().sum(1).mean() - wide.square().mean(0).mean() ** 2
    assert whole["explained_variance"] == pytest.approx(float(1 - ours.value("mse") * d / total), **CLOSE)
    assert abs(whole["explained_variance"] - ours.value("fve")) > 0.05


# ---- dictionary_learning ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dictionary(sae):
    pytest.importorskip("dictionary_learning")

    class Dictionary:
        dict_size, activation_dim = sae.d_sae, sae.d_in

        def __call__(self, x, output_features=False):
            return (sae(x), sae.encode(x)) if output_features else sae(x)

    return Dictionary()


def test_dictionary_learning_loss_recovered_on_padded_text(dictionary, qwen, sae, tokenizer, ids):
    from dictionary_learning.evaluation import loss_recovered
    from nnsight import LanguageModel

    texts = [" ".join(f"w{i}" for i in row[:n].tolist()) for row, n in zip(ids, (24, 20, 15, 24, 9, 12), strict=True)]
    model = LanguageModel(qwen, tokenizer=tokenizer)
    with torch.no_grad():
        clean, with_sae, zero = loss_recovered(texts, model, model.model.layers[1], dictionary)
    ours = evals.splice(qwen, tokenizer, sae, HOOK, texts)
    assert ours.value("ce_clean") == pytest.approx(float(clean), **CLOSE)
    assert ours.value("ce_sae") == pytest.approx(float(with_sae), **CLOSE)
    assert ours.value("ce_zero") == pytest.approx(float(zero), **CLOSE)
    theirs = float((with_sae - zero) / (clean - zero))
    assert ours.value("frac_recovered_zero") == pytest.approx(theirs, rel=5e-6)


def test_dictionary_learning_evaluate(dictionary, ours, x):
    from dictionary_learning.evaluation import evaluate

    theirs = evaluate(dictionary, iter([x]), device="cpu")
    assert ours.value("fve_centred") == pytest.approx(theirs["frac_variance_explained"], **CLOSE)
    assert ours.value("cosine") == pytest.approx(theirs["cossim"], **CLOSE)
    assert ours.value("l2_ratio") == pytest.approx(theirs["l2_ratio"], **CLOSE)
    assert ours.value("relative_bias") == pytest.approx(theirs["relative_reconstruction_bias"], **CLOSE)
    assert ours.value("l0") == pytest.approx(theirs["l0"], **CLOSE)
    assert ours.value("l1") == pytest.approx(theirs["l1_loss"], **CLOSE)
    assert 1 - ours.value("dead_fraction") == pytest.approx(theirs["frac_alive"], **CLOSE)
    # their explained variance forgives a constant error; ours under the plain name does not
    assert theirs["frac_variance_explained"] - ours.value("fve") > 0.05
