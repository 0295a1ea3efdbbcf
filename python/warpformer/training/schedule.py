"""The learning rate of each step."""

import math

FINAL = 0.1  # of the peak, where `cosine` ends


def inverse_sqrt(step: int, warmup_steps: int, max_steps: int | None) -> float:
    return math.sqrt(max(1, warmup_steps) / step)


def cosine(step: int, warmup_steps: int, max_steps: int) -> float:
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def constant(step: int, warmup_steps: int, max_steps: int | None) -> float:
    return 1.0


SCHEDULES = {"inverse_sqrt": inverse_sqrt, "cosine": cosine, "constant": constant}


def learning_rate(
    schedule: str, step: int, peak: float, warmup_steps: int, max_steps: int | None = None
) -> float:
    """The learning rate of a step, a pure function of its number.

        peak step / warmup_steps                                     up to step = warmup_steps
        inverse_sqrt:   peak sqrt(warmup_steps / step)               from there
        cosine:         peak (0.1 + 0.9 (1 + cos(pi t)) / 2)         t from 0 there to 1 at max_steps
        constant:       peak

    Args:
        schedule: one of SCHEDULES.
        step: from 1.
        peak: the highest learning rate, that of step warmup_steps.
        warmup_steps: 0 for none.
        max_steps: the last step, for `cosine`.

    Source: Vaswani et al., "Attention Is All You Need", 5.3, whose factor d_model^-0.5 is the peak here;
    Loshchilov and Hutter, "SGDR", with the end of Hoffmann et al., "Training Compute-Optimal Large Language
    Models".
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * SCHEDULES[schedule](step, warmup_steps, max_steps)
