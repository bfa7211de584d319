"""The Xet side of the hub: hashes, wire formats, and the content-addressed store behind them."""
