"""Reinforcement learning on word problems: our own PPO, and RLOO and GRPO through TRL, with checkpoints as stages."""
