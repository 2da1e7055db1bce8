"""engine/train.py with DeepSpeed, in which the gradients of step 3 are not finite: run by test_zero.py."""

import sys

from engine import train
from engine.strategy.zero import Zero

if __name__ == "__main__":
    steps, forward_backward = [], Zero.forward_backward

    def poisoned(strategy, batches):
        steps.append(len(steps) + 1)
        if steps == [1]:
            parameter = next(iter(strategy.parameters.values()))
            parameter.register_hook(lambda gradient: gradient * float("inf") if len(steps) == 3 else gradient)
        return forward_backward(strategy, batches)

    Zero.forward_backward = poisoned
    train.leave(train.main(sys.argv[1:]))
