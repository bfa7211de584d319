"""What each step will cost, for `--dry-run`: sizes where they follow from the settings."""

from __future__ import annotations

from hubsae.recipes.cost import sae_bytes
from hubsae.recipes.steps import Estimate

from .settings import GridConfig


def estimates(config: GridConfig) -> dict[str, Estimate]:
    """Estimates by step name.

    >>> from hubsae.recipes.registry import find_recipe
    >>> estimates(find_recipe("grid_search").config("tiny"))["train"].what.split(" on ")[0]
    '22 cells'
    """
    d, data = config.model.d_model, config.data
    cells = config.sweep.cells()
    tokens = int(min(data.prompts or data.samples, data.samples) * data.tokens_per_sample)
    latents = sum(cell.d_sae(d) for cell in cells)
    weights = sae_bytes(d, latents)
    seen = int(tokens * config.train.epochs)
    return {
        "subject": Estimate(f"{config.model.label}, {data.id}", disk=4 * config.model.parameters),
        "harvest": Estimate(f"layer {config.data.layer}, about {tokens:,} tokens of width {d}", disk=2 * d * tokens),
        "train": Estimate(
            f"{len(cells)} cells on about {seen:,} tokens each, widths up to {max(c.d_sae(d) for c in cells):,}",
            disk=2 * weights,
            memory=3 * weights,
        ),
        "measure": Estimate(f"{len(cells)} cells, {config.data.texts} test texts each", memory=min(weights, 4 << 30)),
        "synthetic": Estimate(f"{len(config.synthetic.sweep().cells())} cells on {config.synthetic.features} features"),
        "release": Estimate(f"{len(cells)} SAEs", disk=weights),
    }
