"""Self-distillation: a converted model learns from the original, which is the same weights before the conversion."""
