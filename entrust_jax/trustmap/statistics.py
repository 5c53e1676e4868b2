"""What N hypotheses say about a pixel: their mean, their spread, and whether they agree with the one-step
prediction.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

PROBABILITY_FLOOR = 1e-6


def entropy(probability: Float[Array, "*s k"]) -> Float[Array, "*s"]:
    """Entropy -sum_k p_k ln p_k in nats over the last axis, the logarithm's argument clipped at 1e-6.

    Only the logarithm is clipped: -p ln max(p, 1e-6) is concave, so that the entropy of a mean is never below
    the mean of the entropies, which clipping p itself would break.
    """
    return -jnp.sum(probability * jnp.log(jnp.maximum(probability, PROBABILITY_FLOOR)), axis=-1)


def js(p: Float[Array, "*s k"], q: Float[Array, "*s k"]) -> Float[Array, "*s"]:
    """Jensen-Shannon divergence H((p + q)/2) - (H(p) + H(q))/2 of two distributions, in bits, in [0, 1]."""
    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return jnp.maximum(divergence, 0.0) / jnp.log(2.0)


def statistics(hypotheses: Float[Array, "b n *s k"], one_step: Float[Array, "b *s k"]) -> dict[str, Array]:
    """Maps of an ensemble of N hypotheses' probabilities p_n beside the one-step probabilities p_1 (ours).

    Returns what `of_sums` says of their sums.
    """
    count, classes = hypotheses.shape[1], hypotheses.shape[-1]
    winner = jnp.argmax(hypotheses, axis=-1)
    votes = jnp.stack([jnp.sum((winner == k).astype(jnp.float32), axis=1) for k in range(classes)], axis=-1)
    sums = {"p": jnp.sum(hypotheses, axis=1), "entropy": jnp.sum(entropy(hypotheses), axis=1), "votes": votes}
    return of_sums(sums, count, one_step)


def of_sums(sums: dict[str, Array], count: int, one_step: Float[Array, "*s k"]) -> dict[str, Array]:
    """The same maps from what can be added up hypothesis by hypothesis, so that none has to be kept (ours).

    sums over N = `count` hypotheses: p [*s k] of p_n, entropy [*s] of H(p_n) in nats, votes [*s k] of the hard votes.

    Returns (*s, nats unless said):
        mean             [*s k] pbar = 1/N sum_n p_n
        entropy          TU = H(pbar), total predictive entropy
        within           WU = 1/N sum_n H(p_n), what each hypothesis leaves open by itself
        divergence       HU = TU - WU >= 0, mutual information between pixel and hypothesis
        disagreement     GD = N/(N-1) (1 - sum_k q_k^2), q the shares of the hard votes: the unbiased
                         probability that two hypotheses differ here; 0 for N = 1
        gap              |p_1 - pbar|_1 / 2 in [0, 1]: zero up to sampling noise when network and sampler
                         agree, as both estimate the same marginal (tower property)
    """
    mean, within, votes = sums["p"] / count, sums["entropy"] / count, sums["votes"] / count
    total = entropy(mean)
    return {
        "mean": mean,
        "entropy": total,
        "within": within,
        "divergence": jnp.maximum(total - within, 0.0),
        "disagreement": count / max(count - 1, 1) * (1.0 - jnp.sum(votes**2, axis=-1)),
        "gap": 0.5 * jnp.sum(jnp.abs(one_step - mean), axis=-1),
    }
