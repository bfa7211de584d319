"""dictionary_learning loads what hubsae writes in its layout, and writes all of its dictionaries for hubsae to read."""

from __future__ import annotations

import json
from importlib.metadata import version

import torch
from common import WORK, X, close, run
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from safetensors.torch import save_file

D, N, K = X.shape[1], 96, 6
DICTIONARIES = {
    "AutoEncoder": lambda: AutoEncoder(D, N),
    "AutoEncoderNew": lambda: AutoEncoderNew(D, N),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, N, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, N, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, N, K, [N // 2, N // 2]),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, N),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, N),
}


def load(name: str) -> str:
    dictionary, _ = load_dictionary(str(WORK / "dictionary_learning" / name), device="cpu")
    with torch.no_grad():
        return close(name, dictionary.encode(X), dictionary(X))


def save(name: str) -> str:
    torch.manual_seed(0)
    dictionary, folder = DICTIONARIES[name](), WORK / "written" / name
    with torch.no_grad():
        for key, parameter in dictionary.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if key == "threshold":
                parameter.abs_()
        if "threshold" in dict(dictionary.named_buffers()):
            dictionary.threshold.fill_(0.6)
        numbers = {"latents": dictionary.encode(X.clone()), "output": dictionary(X.clone())}
    folder.mkdir(parents=True)
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "layer": 12, "k": K,
               "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_12"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    save_file({key: tensor.detach().contiguous() for key, tensor in numbers.items()}, folder / "numbers.safetensors")
    return "written"


checks = {name: lambda n=name: load(n) for name in ("relu", "topk", "batch_topk")}
run(checks | {f"its own {name}": lambda n=name: save(n) for name in DICTIONARIES}, version("dictionary-learning"))
