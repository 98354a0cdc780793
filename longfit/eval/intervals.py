"""Intervals for small samples: of a rate, of a mean, and of a difference over the same samples."""

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from longfit.errors import InputError


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate, both ends in 0..1.

    It keeps its coverage at n = 20 and at rates of 0 and 1, where the normal interval collapses
    (Wilson 1927; Brown, Cai & DasGupta 2001). ``n = 0`` knows nothing and gives (0, 1).
    """
    if not 0 <= successes <= n:
        raise InputError(f"successes={successes} of n={n}: successes must lie in 0..n")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / n
    scale = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z * ((rate * (1 - rate) + z * z / (4 * n)) / n) ** 0.5 / scale
    # At 0 and n the interval touches the end exactly; rounding must not leave it a hair outside.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def bootstrap_mean(
    values: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 42
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, deterministic by ``seed``.

    Draws are of n - 1 of the n values, as in `stratified_mean`.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise InputError("a bootstrap needs at least one value")
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, data.size, size=(draws, max(1, data.size - 1)))].mean(axis=1)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of ``values`` with its interval: (mean, low, high).

    Right-or-wrong scores take Wilson's interval and others the bootstrap; where all of them are the same share of a
    whole, a bootstrap would claim certainty, and Wilson's interval of that share is taken (too wide, never too narrow).
    """
    mean = sum(values) / len(values) if values else 0.0
    n, right = len(values), sum(values)
    if set(values) <= {0, 1}:
        return mean, *wilson(round(right), n, level)
    if len(set(values)) == 1 and 0 <= mean <= 1:
        low, high = wilson(round(right), n, level)
        return mean, min(low, mean), max(high, mean)
    return mean, *bootstrap_mean(values, level)


def stratified_mean(
    strata: Mapping[str, Sequence[float]], level: float = 0.95, draws: int = 2000, seed: int = 42
) -> tuple[float, float, float]:
    """Mean of the strata's means, each weighing alike, with its interval: (mean, low, high).

    The percentile bootstrap draws within each stratum (RULER's score is a mean over tasks, of which none is a sample),
    n - 1 of its n values at a time: with n of them the spread of a stratum's mean would come out (n - 1) / n of what it
    is (Rao & Wu 1988), half with two samples a task. Where a stratum has one value its spread is not known, and all
    values are drawn from as one sample, which is too wide rather than too narrow.
    """
    if not strata or not all(strata.values()):
        raise InputError("a stratified mean needs at least one value in every stratum")
    mean = sum(sum(values) / len(values) for values in strata.values()) / len(strata)
    if min(map(len, strata.values())) == 1:
        low, high = bootstrap_mean([value for values in strata.values() for value in values], level, draws, seed)
        return float(mean), min(low, mean), max(high, mean)
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for values in strata.values():
        data = np.asarray(values, dtype=np.float64)
        total += data[rng.integers(0, data.size, size=(draws, data.size - 1))].mean(axis=1)
    low, high = np.quantile(total / len(strata), [0.5 - level / 2, 0.5 + level / 2])
    return float(mean), float(low), float(high)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``ours - theirs`` over the same samples, with its interval: (mean, low, high).

    Pairing removes the spread that both share because some samples are harder than others. Right-or-wrong
    scores take Newcombe's square-and-add interval (1998, method 10 without continuity correction), which
    stays wide where every pair differs alike and a bootstrap would claim certainty; others the bootstrap.
    """
    if len(ours) != len(theirs) or not ours:
        raise InputError(f"a paired difference needs equal lengths, got {len(ours)} and {len(theirs)}")
    n = len(ours)
    p, q = sum(ours) / n, sum(theirs) / n
    if not set(ours) | set(theirs) <= {0, 1}:
        low, high = bootstrap_mean([a - b for a, b in zip(ours, theirs, strict=True)], level)
        return p - q, low, high
    (p_low, p_high), (q_low, q_high) = wilson(round(n * p), n, level), wilson(round(n * q), n, level)
    spread = (p * (1 - p) * q * (1 - q)) ** 0.5
    both = sum(a * b for a, b in zip(ours, theirs, strict=True)) / n
    correlation = (both - p * q) / spread if spread else 0.0

    def reach(a: float, b: float) -> float:
        return max(0.0, a * a - 2 * correlation * a * b + b * b) ** 0.5

    return p - q, p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)
