"""GAP, GAP⁻ and ACC: pure functions and torchmetrics classes side by side."""
