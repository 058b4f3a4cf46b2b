"""The MoE layer with sharded experts, and its place in a transformers model."""
