"""Models that are known to be right, or wrong, of the phantom: they prove that the acceptance checks have power.

The exact observer says what Bayes says; each fake departs from it in one way that looks like uncertainty and is none.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from entrust_jax.benchmark.acceptance import CONFLICT, Blobs, Observation
from entrust_jax.data import phantom, phantom_scene
from entrust_jax.enfuse import conflict
from entrust_jax.trustmap import probing, statistics

TEMPERATURE = 2.0  # of the fake that takes conflict for entropy


def readers(scenes: phantom_scene.Scene, spec: phantom.Spec) -> Float[np.ndarray, "n t j"]:
    """P(blob | the modalities of a subset) of every phantom, for every subset in the order of `probing.subsets`."""
    table = jnp.asarray(probing.subsets(len(spec.modalities)).astype(bool))
    of_subset = jax.vmap(lambda evidence, present: phantom.posterior(evidence, present, spec), in_axes=(None, 0))
    return np.asarray(jax.jit(jax.vmap(of_subset, in_axes=(0, None)))(jnp.asarray(scenes.evidence), table))


def marginals(scenes: phantom_scene.Scene, posterior: Float[np.ndarray, "n j"], spec: phantom.Spec) -> np.ndarray:
    """Exact class marginals [n h w k] of blobs with these probabilities of being there."""
    each = jax.jit(jax.vmap(lambda site, distance, p: phantom.marginal(site, distance, p, spec)))
    site, distance = jnp.asarray(scenes.site)[:, 0], jnp.asarray(scenes.distance)[:, 0]
    return np.asarray(each(site, distance, jnp.asarray(posterior, jnp.float32)))


def draw(
    rng: np.random.Generator,
    scenes: phantom_scene.Scene,
    posterior: Float[np.ndarray, "n j"],
    spec: phantom.Spec,
    count: int,
) -> UInt8[np.ndarray, "n s h w"]:
    """Hypotheses from the joint law: blobs independent of each other, the pixels of one hanging together."""
    site, distance = np.asarray(scenes.site)[:, 0], np.asarray(scenes.distance)[:, 0]
    n, sites = posterior.shape
    there = rng.random((n, count, sites)) < posterior[:, None]
    delta = rng.choice(np.asarray(spec.boundary), (n, count, sites))
    index = np.broadcast_to(np.maximum(site, 0).reshape(n, 1, -1), (n, count, site[0].size))
    own = np.take_along_axis(there, index, axis=2)
    radius = spec.radius + np.take_along_axis(delta, index, axis=2)
    inside = own & (distance.reshape(n, 1, -1) <= radius) & (site.reshape(n, 1, -1) >= 0)
    return inside.reshape(n, count, *site.shape[1:]).astype(np.uint8)


def exact(scenes: phantom_scene.Scene, spec: phantom.Spec, count: int, seed: int) -> Observation:
    """What an ideal observer of all the images would say, with `count` hypotheses from the exact law."""
    rng = np.random.default_rng(seed)
    beliefs = readers(scenes, spec)
    whole = marginals(scenes, beliefs[:, -1], spec)
    label = (whole[..., 1] > 0.5).astype(np.uint8)
    values = np.stack([marginals(scenes, beliefs[:, t], spec) for t in range(beliefs.shape[1])])
    chosen = np.take_along_axis(values, label[None, ..., None].astype(np.int64), axis=-1)[..., 0]
    phi = np.asarray(probing.shapley(jnp.log(jnp.maximum(jnp.asarray(chosen), statistics.PROBABILITY_FLOOR))))
    return Observation(
        one_step=whole,
        hypotheses=draw(rng, scenes, beliefs[:, -1], spec, count),
        kappa=opposition(scenes, spec, beliefs),
        attribution=np.moveaxis(phi, 0, 1),
        label=label,
        probability=whole,
        error_probability=1 - np.take_along_axis(whole, label[..., None].astype(np.int64), axis=-1)[..., 0],
        entropy=np.asarray(statistics.entropy(jnp.asarray(whole))),
    )


def opposition(scenes: phantom_scene.Scene, spec: phantom.Spec, beliefs: Float[np.ndarray, "n t j"]) -> np.ndarray:
    """kappa [n h w] of exact unimodal posteriors against the exact positional base rate."""
    alone = unimodal(scenes, spec, beliefs)
    prior = np.maximum(marginals(scenes, beliefs[:, 0], spec), 1e-3)
    support = conflict.support(jnp.asarray(alone), jnp.asarray(prior / prior.sum(-1, keepdims=True)))
    pairs, _ = conflict.pair_conflict(support, jnp.ones(alone.shape[:-1]))
    return np.asarray(conflict.strongest(pairs))


def unimodal(scenes: phantom_scene.Scene, spec: phantom.Spec, beliefs: Float[np.ndarray, "n t j"]) -> np.ndarray:
    """Exact marginals of each modality alone, [n m h w k]."""
    return np.stack([marginals(scenes, beliefs[:, 2**m], spec) for m in range(len(spec.modalities))], axis=1)


def hot_in_conflict(
    seen: Observation, scenes: phantom_scene.Scene, spec: phantom.Spec, found: Blobs, seed: int
) -> Observation:
    """Fake: where readers contradict each other the belief is flattened, as if conflict were entropy."""
    p = np.asarray(scenes.posterior)
    flat = p ** (1 / TEMPERATURE) / (p ** (1 / TEMPERATURE) + (1 - p) ** (1 / TEMPERATURE))
    belief = np.where(found.kind == CONFLICT, flat, p)
    whole = marginals(scenes, belief, spec)
    drawn = draw(np.random.default_rng(seed), scenes, belief, spec, seen.hypotheses.shape[1])
    return seen._replace(one_step=whole, probability=whole, hypotheses=drawn)


def pixel_noise(seen: Observation, seed: int) -> Observation:
    """Fake: every pixel of a hypothesis is drawn by itself; the marginals are right, no mask is one."""
    rng = np.random.default_rng(seed)
    drawn = rng.random(seen.hypotheses.shape) < seen.one_step[:, None, ..., 1]
    return seen._replace(hypotheses=drawn.astype(np.uint8))


def thresholds_of_one_map(seen: Observation, seed: int) -> Observation:
    """Fake: hypothesis s is {p_1 > t_s} with a random t_s: right marginals, whole blobs, all of them nested."""
    rng = np.random.default_rng(seed)
    level = rng.random((*seen.hypotheses.shape[:2], 1, 1))
    return seen._replace(hypotheses=(seen.one_step[:, None, ..., 1] > level).astype(np.uint8))


def divergence_as_conflict(seen: Observation, scenes: phantom_scene.Scene, spec: phantom.Spec) -> Observation:
    """Fake: Jensen-Shannon divergence in place of kappa; it also fires where one reader merely knows nothing."""
    alone = jnp.asarray(unimodal(scenes, spec, readers(scenes, spec)))
    js = conflict.jensen_shannon(alone, jnp.ones(alone.shape[:-1]))
    return seen._replace(kappa=np.asarray(jax.device_get(js)))
