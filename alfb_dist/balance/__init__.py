"""The papers' equations as pure functions of tensors: routing, update rules, auxiliary losses, metrics."""
