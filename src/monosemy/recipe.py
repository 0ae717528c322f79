"""Where our training differs from dictionary_learning's: one field for each difference, with its reason.

`--recipe dictionary_learning` switches all of them off, and then follows recorded runs of that library step
for step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

REFERENCE_STEPS, REFERENCE_BATCH = 244_140, 2048  # of dictionary_learning's runs: 500M tokens
REFERENCE_TOKENS = REFERENCE_STEPS * REFERENCE_BATCH
REFERENCE_LR = 3e-4
SHORT_TOKENS, SHORT_WIDTH = 1_228_800, 4096  # of the longest runs that the law was fitted to, and of one SAE
NARROWEST, WIDTH_POWER, BATCH_POWER = 1024, 1 / 3, 1 / 2
SMALLEST_BATCH, ENOUGH_STEPS = 512, 1200


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
    small_batches: bool = True
    """Short runs take smaller batches, down to 512: at equal tokens they are worth more than speed. With 600k
    tokens of SmolLM2 BatchTopK misses 5 % less of the variance than with 2,048, in about the time."""
    centered: bool = True
    """The ReLU kinds train on activations minus the geometric median of the first batch, which finished SAEs
    take in. Without it latents fire or stay silent by how they lie to the mean, of which few dimensions have
    most, until b_dec has learned it (arXiv 2605.31518). With 300k tokens of SmolLM2 JumpReLU misses 6 % less
    of the variance at an equal L0, gated 13 %. The TopK kinds begin with b_dec there, in dictionary_learning
    too."""
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


def batch_size(recipe: Recipe, tokens: int) -> int:
    """Return the activations of a step, where none are given: 2,048; in shorter runs the power of two that
    makes 1,200 steps or more of them, and 512 at least."""
    if not recipe.small_batches:
        return REFERENCE_BATCH
    most = max(tokens // ENOUGH_STEPS, 1)
    return min(max(1 << (most.bit_length() - 1), SMALLEST_BATCH), REFERENCE_BATCH)


def learning_rate(recipe: Recipe, short_run_lr: float, width: int, steps: int, batch: int) -> float:
    """Return the peak learning rate of a run of `steps` batches of `batch` tokens, where none is given.

    Up to 1.2M tokens it is short_run_lr (4096 / width)^(1/3) (batch / 2048)^(1/2), whose powers were fitted
    (docs/recipes.md). From there it falls as a power of the tokens, to dictionary_learning's 3e-4 at its
    500M. SAEs narrower than 1,024 latents take what those take.
    """
    tokens = steps * batch
    if not recipe.scaled_learning_rate or tokens >= REFERENCE_TOKENS:
        return REFERENCE_LR
    narrow, small = SHORT_WIDTH / max(width, NARROWEST), batch / REFERENCE_BATCH
    short = short_run_lr * narrow**WIDTH_POWER * small**BATCH_POWER
    share = min(math.log(REFERENCE_TOKENS / tokens) / math.log(REFERENCE_TOKENS / SHORT_TOKENS), 1.0)
    return REFERENCE_LR * (short / REFERENCE_LR) ** share


def learning_rate_source(recipe: Recipe, tokens: int) -> str:
    """Say where the learning rate of a run of so many tokens comes from."""
    if not recipe.scaled_learning_rate or tokens >= REFERENCE_TOKENS:
        return "dictionary_learning's"
    if tokens <= SHORT_TOKENS:
        return f"fitted to runs of 0.3M to {SHORT_TOKENS / 1e6:.1f}M tokens, docs/recipes.md"
    return (
        f"between those fitted to runs of up to {SHORT_TOKENS / 1e6:.1f}M tokens and dictionary_learning's "
        f"at {REFERENCE_TOKENS / 1e6:.0f}M; not measured at this length"
    )
