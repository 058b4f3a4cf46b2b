"""The DeepSpeed seam, and what happens around an optimizer step."""
