"""Does the reward work? A tiny Qwen3-architecture model that overthinks, trained by GRPO with ten rewards. docs/evidence.md."""
