"""The slow reference objective agrees with its definition."""

import numpy as np

from megatron_mdm.objective.reference import (
    integrate,
    objective_coefficients,
    patterns,
)

EPS = 0.05


def test_the_oracle_agrees_with_its_own_definition():
    """Compares its closed form with a direct enumeration of masks and quadrature over t."""
    eligible = [True, False, True, True]
    direct = np.zeros((16, 4))
    for n, mask in enumerate(patterns(4)):
        if mask[1]:
            continue
        k = sum(mask)
        for i in range(4):
            if mask[i]:

                def integrand(t, k=k):
                    p = (1 - EPS) * t + EPS
                    return p**k * (1 - p) ** (3 - k) / p / 3

                direct[n, i] = integrate(integrand, 0.0, 1.0)
    np.testing.assert_allclose(objective_coefficients(eligible, EPS), direct, atol=1e-14)
