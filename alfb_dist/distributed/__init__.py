"""Processes: how ranks start, find each other, exchange tensors, agree, fail and stop."""
