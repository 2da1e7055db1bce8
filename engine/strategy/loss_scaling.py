"""Dynamic loss scaling for fp16 (Micikevicius et al., Mixed Precision Training, 2018)."""

from dataclasses import dataclass


@dataclass
class LossScale:
    """`value` multiplies the loss; it halves when a step overflows and doubles after growth_interval good steps."""

    value: float = 65536.0
    growth_interval: int = 2000
    good_steps: int = 0
    minimum: float = 1.0
    maximum: float = 2.0**24

    def update(self, overflowed: bool) -> None:
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, self.minimum)
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = min(self.value * 2, self.maximum), 0
