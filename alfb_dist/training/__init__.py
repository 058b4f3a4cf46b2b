"""A training run: build, loop, stop, resume; and balancing in transformers' Trainer."""
