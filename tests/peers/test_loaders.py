"""Every loader function of SAELens' registry: its files are read alike, at the same place, or refused by name."""

from __future__ import annotations

import pytest
from peers.loaders import FILES, compare

sae_lens = pytest.importorskip("sae_lens")

REFUSED = {"temporal"}
"""Other maths: attention over the tokens before."""
BROKEN = {"sparsify"}
"""SAELens' own function fails on files of sparsify's code (a transposed decoder); hubsae is held to sparsify itself."""


def test_every_loader_of_saelens_has_its_files():
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    assert {name.partition(" ")[0] for name in FILES} == set(NAMED_PRETRAINED_SAE_LOADERS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_both_read_it_alike_or_it_is_refused_by_name(name, tmp_path):
    found = compare(name, tmp_path)
    if name in REFUSED:
        assert found.result.startswith("refused by name (load it with SAELens"), found
    elif name in BROKEN:
        assert found.result == "read; SAELens' loader fails (RuntimeError)", found
    else:
        assert found.result.startswith("equal") and found.latents is not None and found.latents < 2e-5, found
