"""Transcoders: the numbers of SAELens' own classes, in a model at both of their hook points, and through every file."""

from __future__ import annotations

import pytest
import torch

from hubsae import HubSAE, SAEConfig
from hubsae.core.errors import ConfigError
from hubsae.core.fold import TrainedTensors, fold
from hubsae.formats import fidelity, read, write

D_IN, D_OUT, D_SAE = 24, 16, 96
KINDS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
HOOKS = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out", "model_name": "gpt2"}


def lens_transcoder(kind, rand):
    sae_lens = pytest.importorskip("sae_lens")
    cfg = {"architecture": kind, "d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
           "apply_b_dec_to_input": False, "normalize_activations": "none",
           "metadata": {"sae_lens_version": "6.54.0", **HOOKS}}  # fmt: skip
    config = sae_lens.SAE.get_sae_config_class_for_architecture(kind).from_dict(cfg)
    lens = sae_lens.SAE.get_sae_class_for_architecture(kind)(config)
    state = {name: rand(*tensor.shape, scale=0.3) for name, tensor in lens.state_dict().items()}
    if "threshold" in state:
        state["threshold"] = state["threshold"].abs()
    lens.load_state_dict(state)
    return lens


def agree(sae, lens, x):
    with torch.no_grad():
        assert torch.equal(sae.encode(x) != 0, lens.encode(x) != 0)
        assert float((sae.encode(x) - lens.encode(x)).abs().max()) < 1e-5
        mine, theirs = sae(x), lens(x)
        assert mine.shape == (*x.shape[:-1], D_OUT)
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-6
        assert torch.equal(sae.decode(sae.encode_sparse(x)), mine)


@pytest.mark.parametrize("kind", KINDS)
def test_the_four_classes_of_saelens_and_back(kind, rand, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    lens, x = lens_transcoder(kind, rand), rand(3, 7, D_IN)
    lens.save_model(tmp_path / "lens")
    sae = read(tmp_path / "lens")
    agree(sae, lens, x)
    assert (sae.config.d_out, bool(sae.config.skip)) == (D_OUT, "skip" in kind)
    assert sae.metadata.hook.kind == "mlp_in" and sae.metadata.hook_out.kind == "mlp_out"
    agree(HubSAE.from_saelens(lens), lens, x)
    back = sae.to_saelens()
    assert type(back) is type(lens)
    agree(sae, back, x)
    sae.save_pretrained(tmp_path / "native")
    again = sae_lens.SAE.load_from_disk(tmp_path / "native")
    assert type(again) is type(lens) and again.cfg.metadata.hook_name_out == HOOKS["hook_name_out"]
    agree(HubSAE.from_pretrained(tmp_path / "native"), again, x)
    write(sae, tmp_path / "t.pt", "pt")
    agree(read(tmp_path / "t.pt"), lens, x)


def test_what_saelens_has_no_class_for_is_said_and_refused(tmp_path):
    config = SAEConfig(architecture="topk", d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=4, skip=True)
    sae = HubSAE.random(config)
    assert not fidelity(config).exact and not fidelity(config).loads
    with pytest.raises(ConfigError, match="no transcoder"):
        sae.to_saelens()
    sae.save_pretrained(tmp_path)
    sae_lens = pytest.importorskip("sae_lens")
    with pytest.raises(KeyError, match="topk_skip_transcoder"):
        sae_lens.SAE.load_from_disk(tmp_path)
    x = torch.randn(5, D_IN)
    assert torch.equal(HubSAE.from_pretrained(tmp_path)(x), sae(x))


def test_a_transcoder_that_contradicts_itself_is_refused():
    for wrong in ({"apply_b_dec_to_input": True}, {"token_norm": "layer_norm"}):
        with pytest.raises(ValueError, match="lies at its output"):
            SAEConfig(architecture="relu", d_in=4, d_sae=8, d_out=4, **wrong)
    with pytest.raises(ValueError, match="give d_out"):
        SAEConfig(architecture="relu", d_in=4, d_sae=8, skip=True)
    with pytest.raises(ConfigError, match="dense code does not hold it"):
        sae = HubSAE.random(SAEConfig(architecture="relu", d_in=4, d_sae=8, d_out=4, skip=True))
        sae.decode(sae.encode(torch.randn(2, 4)))


@pytest.mark.parametrize("pre_bias", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_input_and_output_normalisers_and_a_pre_bias_fold_exactly(output, pre_bias, rand):
    t = {n: rand(*s).double() for n, s in {"E": (D_IN, D_SAE), "D": (D_SAE, D_OUT), "b": (D_OUT,), "p": (D_IN,),
                                           "a": (D_SAE,), "S": (D_OUT, D_IN)}.items()}  # fmt: skip
    mean, std = rand(D_IN).double() * 9, rand(D_IN).double().abs() + 0.1
    mean_out, std_out = rand(D_OUT).double() * 9, rand(D_OUT).double().abs() + 0.1
    trained = TrainedTensors(t["E"], t["D"], t["b"], t["p"] if pre_bias else None, {"b_enc": t["a"]}, W_skip=t["S"])
    tensors, subtract = fold(trained, mean, std, output=(mean_out, std_out) if output else None, transcoder=True)
    sae = HubSAE(
        SAEConfig(architecture="relu", d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, skip=True, dtype="float64"), tensors
    )
    x = rand(50, D_IN).double() * std + mean
    z = (x - mean) / std
    want = ((z - t["p"] if pre_bias else z) @ t["E"] + t["a"]).relu() @ t["D"] + t["b"] + z @ t["S"].t()
    if output:
        want = want * std_out + mean_out
    assert subtract is False
    assert float((sae(x) - want).norm() / want.norm()) < 1e-12


def test_attach_reads_at_the_input_and_splice_replaces_at_the_output():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50)).eval()
    mlp, ids = model.transformer.h[1].mlp, torch.tensor([[1, 2, 3, 4]])
    # a transcoder that is the MLP, as far as a linear map can be: its output then stands in for the MLP's
    sae = HubSAE.random(SAEConfig(architecture="relu", d_in=16, d_sae=64, d_out=16, skip=True))
    sae.metadata.hook.layer, sae.metadata.hook.kind = 1, "mlp_in"
    sae.metadata.hook_out = type(sae.metadata.hook)(layer=1, kind="mlp_out")
    seen = {}
    handles = [
        mlp.register_forward_hook(lambda m, args, out: seen.update(x=args[0].clone(), y=out.clone())),
        model.transformer.h[2].register_forward_pre_hook(lambda m, args: seen.update(after=args[0].clone())),
    ]
    with torch.no_grad():
        with sae.attach(model) as acts:
            model(ids)
        assert torch.equal(acts.codes.dense(), sae.encode(seen["x"]))
        plain = seen["after"]
        with sae.splice(model):
            spliced = model(ids).logits
        assert torch.allclose(seen["after"], plain - seen["y"] + sae(seen["x"]), atol=1e-5)
        with sae.splice(model, mask=torch.tensor([[True, False, False, False]])):
            model(ids)
        assert torch.allclose(seen["after"][:, 1:], plain[:, 1:], atol=1e-6)
        with sae.steer(model, feature=3, strength=2.0, unit=False):
            model(ids)
        assert torch.allclose(seen["after"], plain + 2 * sae.W_dec[3], atol=1e-5)
        assert not torch.allclose(spliced, model(ids).logits)
    for handle in handles:
        handle.remove()


def test_measures_that_compare_with_the_input_refuse_a_transcoder():
    from hubsae.evals import reconstruction

    sae = HubSAE.random(SAEConfig(architecture="relu", d_in=8, d_sae=16, d_out=8))
    with pytest.raises(ConfigError, match="predicts another hook point"):
        reconstruction(sae, torch.randn(32, 8))
