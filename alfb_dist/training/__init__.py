"""A training run: built, looped, stopped, resumed; also balancing inside transformers' Trainer."""
