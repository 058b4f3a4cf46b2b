"""The MoE layer with sharded experts, and how a transformers model gets it."""
