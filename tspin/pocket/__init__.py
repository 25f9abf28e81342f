"""The embedded preset: a small Llama, and ten short verifiable tasks it half knows."""
