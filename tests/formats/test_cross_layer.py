"""Cross-layer transcoders: the sums of circuit-tracer, from its files and Gemma Scope's, and inside a model."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hubsae.core.errors import ConfigError, FormatError, HookError
from hubsae.formats import detect, read, read_cross_layer

LAYERS, D, D_SAE = 3, 16, 40


@pytest.fixture
def weights():
    """Stacked over layers, as circuit-tracer holds them: decoders [d_sae, layers - l, d]."""
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_SAE, D), "b_enc": (D_SAE,), "b_dec": (D,), "skip": (D, D)}
    made = {name: torch.randn(LAYERS, *shape, generator=g) * 0.3 for name, shape in shapes.items()}
    made["threshold"] = torch.rand(LAYERS, D_SAE, generator=g) * 0.3
    made["W_dec"] = torch.randn(LAYERS, D_SAE, LAYERS, D, generator=g) * 0.3
    return made


def expected(w, x, *, threshold, skip):
    """z = W_enc x + b_enc, jump; y[m] = Σ over l <= m of z[l] W_dec[l, m] + b_dec[m] (+ x[m] skip[m])."""
    pre = torch.einsum("lbd,lfd->lbf", x, w["W_enc"]) + w["b_enc"][:, None]
    z = pre * (pre > w["threshold"][:, None]) if threshold else pre.relu()
    y = [sum(z[n] @ w["W_dec"][n, :, m] for n in range(m + 1)) + w["b_dec"][m] for m in range(LAYERS)]
    return z, torch.stack(y) + (x @ w["skip"] if skip else 0)


def circuit_tracer_files(w, folder, *, threshold):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(LAYERS):
        parts = {f"{name}_{n}": w[name][n] for name in ("W_enc", "b_enc", "b_dec", *(["threshold"] * threshold))}
        save_file(parts, folder / f"W_enc_{n}.safetensors")
        save_file({f"W_dec_{n}": w["W_dec"][n, :, n:].contiguous()}, folder / f"W_dec_{n}.safetensors")
    config = {"model_name": "google/gemma-2-2b", "feature_input_hook": "hook_resid_mid"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"feature_output_hook": "hook_mlp_out"}))


def gemma_files(w, folder, *, skip):
    folder.mkdir(parents=True)
    for n in range(LAYERS):
        parts = {"w_enc": w["W_enc"][n].t().contiguous(), "w_dec": w["W_dec"][n].contiguous()}
        parts |= {name: w[name][n] for name in ("b_enc", "b_dec", "threshold")}
        save_file(parts | ({"affine_skip_connection": w["skip"][n]} if skip else {}),
                  folder / f"params_layer_{n}.safetensors")  # fmt: skip


def agrees(clt, w, x, **how):
    z, y = expected(w, x, **how)
    codes = clt.encode_sparse(list(x))
    for n in range(LAYERS):
        torch.testing.assert_close(codes[n].dense(), z[n], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(clt(list(x))), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [False, True])
def test_circuit_tracers_folder(weights, threshold, tmp_path):
    circuit_tracer_files(weights, tmp_path, threshold=threshold)
    clt = read_cross_layer(tmp_path)
    agrees(clt, weights, torch.randn(LAYERS, 7, D), threshold=threshold, skip=False)
    assert clt.base_model == "google/gemma-2-2b" and clt.d_out == (D,) * LAYERS
    assert [h.kind for h in clt.hooks] == ["resid_mid"] * LAYERS and clt.hooks_out[2].name == "layers.2.mlp_out"
    # what SAELens' loader makes of one layer sums its decoders: the same latents, another output
    one = clt.layer(1)
    assert one.config.d_out == 2 * D and torch.equal(one.W_dec, weights["W_dec"][1, :, 1:].flatten(1))


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2s_folder(weights, skip, tmp_path):
    folder = tmp_path / "gemma-scope-2-270m-pt" / "clt" / "width_262k_l0_medium"
    gemma_files(weights, folder, skip=skip)
    clt = read_cross_layer(folder)
    agrees(clt, weights, torch.randn(LAYERS, 7, D), threshold=True, skip=skip)
    assert clt.base_model == "google/gemma-3-270m" and clt.hooks[1].name == "layers.1.mlp_in"


def test_a_single_layer_and_missing_layers_are_refused_by_name(weights, tmp_path):
    circuit_tracer_files(weights, tmp_path, threshold=False)
    for path in (tmp_path, tmp_path / "W_enc_1.safetensors"):
        assert [r.format for r in detect(path)] == ["cross_layer"]
        with pytest.raises(FormatError, match="read_cross_layer"):
            read(path)
    (tmp_path / "W_dec_1.safetensors").rename(tmp_path / "aside")
    with pytest.raises(FormatError, match=r"W_dec_1\.safetensors"):
        read_cross_layer(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "W_dec_1.safetensors")
    (tmp_path / "W_enc_2.safetensors").unlink()
    with pytest.raises(FormatError, match="3 layers, as the decoder"):
        read_cross_layer(tmp_path)
    with pytest.raises(FormatError, match="a file for every layer"):
        read_cross_layer(tmp_path / "config.yaml")


@pytest.mark.parametrize("skip", [False, True])
def test_in_a_model_it_reads_every_input_and_stands_in_for_every_output(weights, skip, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=D, n_layer=LAYERS, n_head=2, vocab_size=50)).eval()
    gemma_files(weights, tmp_path / "clt", skip=skip)
    clt = read_cross_layer(tmp_path / "clt")
    ids, seen = torch.tensor([[1, 2, 3, 4, 5]]), {}
    with torch.no_grad(), clt.attach(model) as codes:
        handles = [
            block.mlp.register_forward_hook(lambda m, args, out, n=n: seen.update({n: args[0]}))
            for n, block in enumerate(model.transformer.h)
        ]
        model(ids)
    for n in range(LAYERS):
        assert torch.equal(codes[n].dense(), clt.layer(n).encode(seen[n]))
    for handle in handles:
        handle.remove()

    inputs = []

    def stand_in(module, args, out):  # the formula, written out at each MLP
        inputs.append(args[0][0])
        x = torch.stack([*inputs, *[inputs[0]] * (LAYERS - len(inputs))])
        return expected(weights, x, threshold=True, skip=skip)[1][len(inputs) - 1][None]

    with torch.no_grad():
        with clt.splice(model):
            spliced = model(ids).logits
            assert torch.allclose(model(ids).logits, spliced)  # nothing is left over from one pass to the next
        handles = [block.mlp.register_forward_hook(stand_in) for block in model.transformer.h]
        by_hand = model(ids).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(spliced, by_hand, atol=1e-4, rtol=1e-4)
    clt.hooks = ()
    with pytest.raises(HookError, match="names no hook points"), clt.attach(model):
        pass


def test_decoding_with_a_skip_needs_the_inputs(weights, tmp_path):
    gemma_files(weights, tmp_path / "clt", skip=True)
    clt, x = read_cross_layer(tmp_path / "clt"), list(torch.randn(LAYERS, 2, D))
    with pytest.raises(ConfigError, match=r"decode\(codes, x\)"):
        clt.decode(clt.encode_sparse(x))
    with pytest.raises(ConfigError, match="2 inputs for 3 layers"):
        clt(x[:2])
