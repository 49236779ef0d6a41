"""What two models' answers on the same images say of their accuracy: an interval of the drop, and McNemar's test.

Only images that one of them gets right and the other wrong say anything: images both get right tell as little as those
both get wrong. So a drop of a few tenths of a point can be told from chance with far fewer images than two separate
standard errors suggest.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

Z_95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class PairedAccuracy:
    """Of `images`, how many the reference alone is right on (`lost`), and how many the other alone (`won`)."""

    images: int
    lost: int
    won: int

    @classmethod
    def of(cls, reference: np.ndarray, other: np.ndarray) -> Self:
        """From two arrays [N] of whether each is right on each image."""
        return cls(images=len(other), lost=int((reference & ~other).sum()), won=int((~reference & other).sum()))

    @property
    def drop(self) -> float:
        """Points of top-1 that the other loses."""
        return 100 * (self.lost - self.won) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The drop's 95 % interval in points: Wald's, with one image more of each kind that differs.

        Bonett and Price, Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired
        Data, Journal of Educational and Behavioral Statistics 37 (2012).
        """
        lost, won = ((count + 1) / (self.images + 2) for count in (self.lost, self.won))
        half = Z_95 * math.sqrt((lost + won - (lost - won) ** 2) / (self.images + 2))
        return 100 * max(-1.0, lost - won - half), 100 * min(1.0, lost - won + half)

    @property
    def p_value(self) -> float:
        """How likely chance alone splits the images that differ so unevenly: McNemar's exact test, two-sided."""
        differing, fewer = self.lost + self.won, min(self.lost, self.won)
        everything = math.lgamma(differing + 1) - differing * math.log(2)
        shares = (everything - math.lgamma(k + 1) - math.lgamma(differing - k + 1) for k in range(fewer + 1))
        return min(1.0, 2 * math.fsum(map(math.exp, shares)))
