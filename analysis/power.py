"""What a rule can decide: how often it comes to which verdict, by simulation with the variances that were measured.

A simulated experiment has means per seed and policy, with the covariance between policies that the seeds show, around
true averages, plus one error of the problems, common to all seeds. The rule judges it as it judges the results.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from .intervals import Estimate, at_least
from .scores import Policy, Scores, Weights
from .verdicts import Rule

EXPERIMENTS = 4000


class Variation:
    """How the averages of some policies vary: between seeds, and with the problems that all seeds share."""

    def __init__(self, scores: Scores, policies: Sequence[Policy]):
        """Raises ValueError where they share fewer than two seeds: one tells no spread."""
        seeds = scores.common_seeds(policies)
        if len(seeds) < 2:
            raise ValueError("one seed tells no spread")
        self.policies, self.count = list(policies), len(seeds)
        values = np.stack(
            [scores.values(policy, seeds) for policy in policies]
        )  # (policies, seeds, benchmarks, problems)
        means = np.nanmean(values, -1)
        self.between_seeds = np.atleast_2d(np.cov(means.mean(-1)))
        self.problems, self.noise = np.zeros_like(self.between_seeds), np.zeros_like(self.between_seeds)
        self.noise_df = 0.0
        for benchmark in range(values.shape[2]):
            part = values[:, :, benchmark]
            part = part[..., ~np.isnan(part).any((0, 1))]
            own = part.mean(1)
            left = part - own[:, None] - part.mean(-1, keepdims=True) + own.mean(-1)[:, None, None]
            free = (self.count - 1) * (part.shape[-1] - 1)
            noise = np.einsum("asp,bsp->ab", left, left) / free / self.count / part.shape[-1]
            self.problems += np.atleast_2d(np.cov(own)) / part.shape[-1] - noise
            self.noise += noise
            self.noise_df += free
        self.problems /= values.shape[2] ** 2
        self.noise /= values.shape[2] ** 2

    def simulated(self, contrasts: Sequence[Weights], averages: Mapping[Policy, float]) -> list[Estimate]:
        """Estimates of some contrasts in EXPERIMENTS experiments (arrays), where `averages` are the truth."""
        generator = np.random.default_rng(0)
        drawn = partial(_normal, generator)
        truth = np.array([averages[policy] for policy in self.policies])
        means = truth + drawn(self.between_seeds, (EXPERIMENTS, self.count)) + drawn(self.problems, (EXPERIMENTS, 1))
        found = []
        for weights in contrasts:
            vector = np.array([weights.get(policy, 0.0) for policy in self.policies])
            values = means @ vector  # (EXPERIMENTS, seeds)
            shared = max(float(vector @ self.problems @ vector), 0.0)
            least = float(vector @ self.noise @ vector)
            spread, df = at_least(values.var(1, ddof=1) / self.count, self.count, least, self.noise_df)
            found.append(Estimate(values.mean(1), self.count, spread, shared, seed_df=df))
        return found


def chances(
    variation: Variation, contrasts: Sequence[Weights], rule: Rule, averages: Mapping[Policy, float]
) -> dict[str, float]:
    """How often a rule comes to which verdict, where `averages` are the truth."""
    verdicts, counts = np.unique(rule(variation.simulated(contrasts, averages)), return_counts=True)
    return {str(verdict): float(count) / EXPERIMENTS for verdict, count in zip(verdicts, counts, strict=True)}


def _normal(generator: np.random.Generator, covariance: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Normal vectors of a covariance, whose estimate may have small negative directions: those vary not at all."""
    values, directions = np.linalg.eigh(covariance)
    drawn: np.ndarray = generator.standard_normal((*size, len(values))) * np.sqrt(values.clip(min=0)) @ directions.T
    return drawn
