"""What the papers define, as pure functions of tensors: routing, update rules, auxiliary losses, metrics."""
