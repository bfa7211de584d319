"""The SAEs of the release, by name; read inside the environments and outside."""

NAMES = ("relu", "topk", "batch_topk", "jumprelu", "gated")
VOCABULARY = 100
