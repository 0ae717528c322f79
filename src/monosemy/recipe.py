"""Where our training differs from dictionary_learning's: one field for each difference, with its reason.

`--recipe dictionary_learning` switches all of them off, and then follows recorded runs of that library step
for step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

REFERENCE_STEPS = 244_140  # of dictionary_learning's runs: 500M tokens in batches of 2048
REFERENCE_LR = 3e-4
SHORT_STEPS, SHORT_WIDTH = 150, 1024  # of the runs that the architectures' short_run_lr was chosen in
WIDTH_POWER = 0.25


@dataclass(frozen=True)
class Recipe:
    """The differences; True is ours."""

    scaled_schedules: bool = True
    """Warm-ups, the threshold's and the annealing's start and the dead-latent limit are shares of a short
    run. dictionary_learning's numbers are for 500M tokens: in a run of 300 steps its learning rate would not
    reach a third, nothing would be dead and no threshold would be set."""
    scaled_learning_rate: bool = True
    """Short runs take larger steps: with 600k tokens of SmolLM2 dictionary_learning's 3e-4 leaves BatchTopK
    at .88 of the loss recovered, 3e-3 at .98."""
    threshold_mean: bool = True
    """The running threshold is a plain mean of its first values, as many as its average remembers, before it
    becomes that average. dictionary_learning keeps 37 % of its very first value for a thousand steps."""
    threshold_always_set: bool = True
    """The threshold is tracked from the run's last step at the latest. dictionary_learning's runs of up to
    1,001 steps keep -1, a plain ReLU."""
    fired_if_positive: bool = True
    """A TopK latent fired if its value is positive. dictionary_learning counts every selected one, so latents
    that never help never count as dead."""
    step_of_preactivations: bool = True
    """JumpReLU's L0 steps at the pre-activation, as in its paper. dictionary_learning's steps at the gated
    value, whose kernel has only its upper half."""
    nonnegative_thresholds: bool = True
    """JumpReLU's thresholds stay at 0 or above.

    Below, dictionary_learning's training lets negative values through and its inference does not.
    """
    single_mean: bool = True
    """Matryoshka's loss is the mean over its prefixes. dictionary_learning divides by their number twice,
    which makes AuxK weigh that much more."""
    annealing_ends: bool = True
    """p_anneal reaches p_end. dictionary_learning puts its last change at the step after the run and stops at
    0.29 on the way to 0.2."""


MONOSEMY = Recipe()
DICTIONARY_LEARNING = Recipe(**dict.fromkeys(Recipe.__dataclass_fields__, False))
RECIPES = {"monosemy": MONOSEMY, "dictionary_learning": DICTIONARY_LEARNING}


def learning_rate(recipe: Recipe, short_run_lr: float, width: int, steps: int) -> float:
    """Return the peak learning rate of a run, where none is given.

    dictionary_learning's at its length; the architecture's own in the shortest runs, less in wide SAEs;
    between them a power of the number of steps.
    """
    if not recipe.scaled_learning_rate or steps >= REFERENCE_STEPS:
        return REFERENCE_LR
    short = max(short_run_lr * (SHORT_WIDTH / width) ** WIDTH_POWER, REFERENCE_LR)
    share = min(math.log(REFERENCE_STEPS / steps) / math.log(REFERENCE_STEPS / SHORT_STEPS), 1.0)
    return REFERENCE_LR * (short / REFERENCE_LR) ** share
