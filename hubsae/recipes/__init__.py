"""What recipes share: a run folder that resumes, config with overrides, the tiny world, reinforcement learning."""
