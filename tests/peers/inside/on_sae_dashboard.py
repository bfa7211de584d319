"""SAEDashboard makes feature dashboards of every SAE, and Neuronpedia's converter its batch, weights folded first."""

from __future__ import annotations

import json
from importlib.metadata import version
from types import SimpleNamespace

import torch
from common import NAMES, VOCABULARY, WORK, run, tokens, transformer_lens_model
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE

MODEL = transformer_lens_model()


def dashboards(name: str):
    sae = SAE.load_from_disk(WORK / "release" / name)
    sae.fold_W_dec_norm()  # as its runner for Neuronpedia does
    features = [int(f) for f in torch.arange(8)]
    config = SaeVisConfig(hook_point=sae.cfg.metadata.hook_name, features=features, minibatch_size_tokens=16)
    return sae, SaeVisRunner(config).run(encoder=sae, model=MODEL, tokens=tokens())


def render(name: str) -> str:
    _, data = dashboards(name)
    return f"{len(data.feature_data_dict)} features"


def neuronpedia(name: str) -> str:
    _, data = dashboards(name)
    config = SimpleNamespace(
        n_prompts_total=32, n_tokens_in_prompt=24, huggingface_dataset_path="none", model_id="tiny", layer=1,
        sae_set="release", np_set_name=None, np_sae_id_suffix=None, vector_names=None,
    )  # fmt: skip
    text = NeuronpediaConverter.convert_to_np_json(MODEL, data, config, {i: f"w{i}" for i in range(VOCABULARY)})
    return f"a batch of {len(json.loads(text)['features'])} features"


checks = {f"dashboard of {name}": lambda n=name: render(n) for name in NAMES}
run(checks | {f"Neuronpedia's batch of {n}": lambda n=n: neuronpedia(n) for n in ("relu", "topk")},
    version("sae-dashboard"))  # fmt: skip
