"""The random stream that one part of a simulated visit draws from."""

import torch


class Stream:
    """Random numbers of one part of one visit, from its own seed; no other random state is read or changed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def effect(self, strength: float) -> float:
        """Between 40% and 100% of the strength: a part that is on always shows."""
        return strength * self.uniform(0.4, 1.0)

    def sign(self) -> int:
        """1 or -1, equally likely."""
        return 1 if self.uniform() < 0.5 else -1

    def choose(self, options: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
        """One of the colours, ``(3, 1, 1)``."""
        return torch.tensor(options[int(self.uniform(0, len(options)))])[:, None, None]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers in that shape."""
        return torch.randn(shape, generator=self.generator)
