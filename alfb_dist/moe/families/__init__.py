"""Differences between transformers' model families: where their parts are, how gates and experts compute."""
