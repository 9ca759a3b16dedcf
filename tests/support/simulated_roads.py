"""Results of sweeps of roads with a known best share."""

from dataclasses import replace

import numpy as np

from support.simulated_sweep import complete

SHARES = (0.25, 0.5, 0.75, 0.9)
BUDGETS = (5e12, 1.6e13, 5e13)
CURVATURES = (0.08, 0.03, 0.05)  # of u^2, u x and x^2, nats
ODDS = (2.0, 0.2)  # of the best share at 1e13 FLOPs, and the power of C with which they change
PARAMS, LOSS = (4e5, 0.6), (4.2, -0.062)  # N* and L* of the best share, alike


def truth(budget, law):
    """Return a power law at a budget."""
    value, exponent = law
    return value * (budget / 1e13) ** exponent


def roads(seed=0, noise=0.005, shares=SHARES, odds=ODDS, sizes=(-1.0, -0.2, 1.0), seeds=(0,)):
    """Return the roads of one sweep, with three seeds in three cells; `sizes` are in log N from the best."""
    rng = np.random.default_rng(seed)
    template = complete()[0]
    results = []
    for i, budget in enumerate(BUDGETS):
        for share in shares:
            for j, offset in enumerate(sizes):
                repeated = (i, share, j) in ((0, shares[1], 1), (0, shares[-2], 1), (1, shares[-2], 1))
                for run in range(3) if repeated else seeds:
                    n = round(truth(budget, PARAMS) * np.exp(offset))
                    x = np.log(share / (1 - share)) - np.log(truth(budget, odds))
                    u = np.log(n / truth(budget, PARAMS))
                    loss = truth(budget, LOSS) + np.dot(CURVATURES, (u**2, u * x, x**2))
                    loss += noise * rng.standard_normal()
                    road = f"arm{100 * share:g}"
                    results.append(
                        replace(
                            template,
                            id=f"{road}-{budget:.3g}-{n}-{run}",
                            objective=road,
                            preset=f"n{n}",
                            seed=run,
                            budget=budget,
                            flops=budget,
                            params=n,
                            tokens=round(budget / 6 / n),
                            loss=float(loss),
                            loss_stderr=0.0,
                            loss_per_draw=(),
                            arm_share=share,
                            autoregressive_loss=3.9 + share / 10,
                            first_autoregressive_loss=3.6,
                        )
                    )
    return results


def with_twins(seed=0, **options):
    """Return the roads of one sweep, and the MDMs and ARMs of another."""
    return complete(seed) + roads(seed, **options)
