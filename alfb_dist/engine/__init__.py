"""The DeepSpeed engine around sharded experts, and the balancing around an optimizer step."""
