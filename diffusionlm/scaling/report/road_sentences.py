"""The sentences about roads: what the best share gains, whether it moves with compute, and what skill is kept."""

from diffusionlm.scaling.laws.roads import Roads
from diffusionlm.scaling.laws.shares import AtShare
from diffusionlm.scaling.report.formatting import number


def about_roads(roads: Roads) -> list[str]:
    """Return the sentences, one for each paragraph."""
    sentences = [
        "A road is named by its autoregressive share: ARM50 is an autoregressive model for the first half of its "
        "steps, and then a diffusion model. Steps of both kinds are charged alike. ROAD is the best share of each "
        "budget."
    ]
    for name, rows in roads.differences.items():
        if rows:
            values = ", ".join(f"{number(estimate)} at {budget:.3g} FLOPs" for budget, estimate in rows)
            sentences.append(f"With the best share the loss minus that of {name.upper()} at equal compute is {values}.")
    if law := roads.laws.get("share"):
        moves = f"the share {'grows' if law.exponent.value > 0 else 'falls'} with compute"
        if not law.exponent.excludes(0):
            moves = "nothing shows that the share moves with compute"
        sentences.append(f"The odds of the best share change as C to the power {number(law.exponent)}, so {moves}.")
    kept = [sentence for fit in roads.budgets if (sentence := _about_skill(fit.budget, fit.shares))]
    return sentences + kept


def _about_skill(budget: float, shares: tuple[AtShare, ...]) -> str:
    """Say what the network with the smallest bound of a budget has forgotten; "" where that was not measured."""
    best = min(shares, key=lambda at: at.best_loss)
    last, first = best.autoregressive_loss, best.first_autoregressive_loss
    if last is None or first is None:
        return ""
    verb = "rose" if last > first else "fell"
    return (
        f"At {budget:.3g} FLOPs the network with the smallest bound ({100 * best.share:g}%, {best.best_loss:.4g} nats "
        f"per token) had an exact autoregressive loss of {first:.4g} when attention opened, which {verb} to {last:.4g} "
        "by the end."
    )
