"""Why a prediction is unreliable: what changes when a modality, or the conflict between them, is taken away.

Every probe acts on cached evidence through one callable with common random numbers, so that two probes differ
by what was silenced and not by their noise.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from entrust_jax.trustmap.statistics import PROBABILITY_FLOOR, entropy, js

CONFLICT_SCALE = 0.1


def gate(conflict: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """g(kappa) = 1 - exp(-kappa / .1): how far a local probe acts, 0 without conflict, .63 at kappa = .1."""
    return 1.0 - jnp.exp(-conflict / CONFLICT_SCALE)


def subsets(modalities: int) -> np.ndarray:
    """All 2^M subsets as a 0/1 table [2^M, M]: row i holds modality m when bit m of i is set; row 0 is
    empty.
    """
    return ((np.arange(2**modalities)[:, None] >> np.arange(modalities)[None, :]) & 1).astype(np.float32)


def shapley(values: Float[Array, "t *s"]) -> Float[Array, "m *s"]:
    """Exact Shapley values of a game whose 2^M coalition values are listed in the order of `subsets` (Shapley
    1953).

        phi_m = sum over S without m of |S|! (M - |S| - 1)! / M! (v(S + m) - v(S))

    They add up to v(all) - v(empty); a player that changes no coalition gets exactly 0.
    """
    modalities = int(values.shape[0]).bit_length() - 1
    if values.shape[0] != 2**modalities or modalities < 1:
        raise ValueError(f"a game of M players has 2^M values, got {values.shape[0]}")
    number = np.arange(2**modalities)
    result = []
    for m in range(modalities):
        without = number[(number >> m) & 1 == 0]
        size = np.array([int(i).bit_count() for i in without])
        weight = np.array([math.factorial(s) * math.factorial(modalities - s - 1) for s in size], np.float32)
        weight = (weight / math.factorial(modalities)).reshape((-1, *(1,) * (values.ndim - 1)))
        # differences before the weighted sum: the two values of a player without effect cancel exactly
        result.append(jnp.sum(weight * (values[without | (1 << m)] - values[without]), axis=0))
    return jnp.stack(result)


def _table(modalities: int) -> dict[str, np.ndarray]:
    """The probes in the order subsets, conflict features off, P2 for each m, P3 for each m.

    keep [T, M]: modalities that take part at all; silence [T, M]: those silenced where g(kappa) says so;
    conflict [T]: factor on the conflict features.
    """
    eye, one = np.eye(modalities, dtype=np.float32), np.ones((modalities, modalities), np.float32)
    whole = subsets(modalities)
    return {
        "keep": np.concatenate([whole, one[:1], one, one]),
        "silence": np.concatenate([0 * whole, 0 * one[:1], eye, one - eye]),
        "conflict": np.repeat(np.array([1, 0, 1], np.float32), [2**modalities, 1, 2 * modalities]),
    }


def probe(
    one_step: Callable[[Float[Array, "b m *s"], Float[Array, "b"]], Float[Array, "b *s k"]],
    present: Bool[Array, "b m"],
    conflict: Float[Array, "b *s"],
    reliability: Float[Array, "b m *s"],
    label: Int[Array, "b *s"],
    classes: int,
) -> dict[str, Array]:
    """Conflict-guided probing of the one-step prediction p_1 (ours; Shapley values: Shapley 1953).

    `one_step(availability [b m *s] in [0, 1], conflict_scale [b])` gives p_1 from the cached evidence with
    the same noise at every call; it is traced once, under a `lax.scan` over the 2^M + 1 + 2M probes, whose
    availability is made inside it and of which only what is asked is kept: of all but the last subset p^S(yhat)
    alone. `reliability` are the fusion weights w_m, `label` the delivered mask yhat, `classes` K.

        subsets      p^S: only the modalities of S, everywhere; S = empty is the null condition
        P1           p^{F_cf = 0}: conflict features off
        P2           p^{-m}: availability of m times 1 - g(kappa)
        P3           p^{m only}: availability of every n != m times 1 - g(kappa)

    Returns
        attribution           phi [b m *s], nats: Shapley values of v(S) = log p^S(yhat); exactly 0 where m is
                              absent; the modality that argues most against yhat is argmin over m of phi, not
                              argmax |phi|
        delta_conflict        [b *s] JS(p, p^{F_cf = 0}), bits
        delta_modality        [b m *s] JS(p, p^{-m}), bits; 0 for an absent modality
        counterfactual        [b m *s k] p^{m only}; p itself for an absent modality
        conflict_uncertainty  [b *s] max(0, H(p) - H(p^{r only})), nats, r = argmax_m w_m at the pixel: what
                              would become certain if the most reliable modality alone were right
    """
    modalities = present.shape[1]
    space = (1,) * (conflict.ndim - 1)
    here = present.astype(jnp.float32).reshape(present.shape + space)
    where = gate(conflict)[:, None]
    table = {name: jnp.asarray(value) for name, value in _table(modalities).items()}

    whole = 2**modalities
    table["number"] = jnp.arange(len(table["conflict"]))

    def call(kept: Array, row: dict[str, Array]) -> tuple[Array, Array]:
        keep, silence = (row[name].reshape((1, modalities, *space)) for name in ("keep", "silence"))
        p = one_step(here * keep * (1.0 - silence * where), jnp.broadcast_to(row["conflict"], present.shape[:1]))
        # The subsets come first and the last of them is whole: it alone stays in the first place.
        place = jnp.maximum(row["number"] - (whole - 1), 0)
        chosen = jnp.take_along_axis(p, label[..., None], axis=-1)[..., 0]
        return lax.dynamic_update_index_in_dim(kept, p, place, 0), chosen

    kept, chosen = lax.scan(call, jnp.zeros((2 + 2 * modalities, *label.shape, classes)), table)
    full, no_conflict = kept[0], kept[1]
    silenced, alone = kept[2 : 2 + modalities], kept[2 + modalities :]

    phi = shapley(jnp.log(jnp.maximum(chosen[:whole], PROBABILITY_FLOOR)))
    everywhere = jnp.broadcast_to(full[None], alone.shape)
    delta = js(silenced, everywhere)
    exists = jnp.moveaxis(here, 1, 0)
    alone = jnp.where(exists[..., None] > 0, alone, everywhere)
    trusted = jnp.argmax(jnp.where(here > 0, reliability, -jnp.inf), axis=1)
    open_alone = jnp.take_along_axis(jnp.moveaxis(entropy(alone), 0, 1), trusted[:, None], axis=1)[:, 0]
    return {
        "attribution": jnp.moveaxis(phi, 0, 1),
        "delta_conflict": js(full, no_conflict),
        "delta_modality": jnp.moveaxis(delta * exists, 0, 1),
        "counterfactual": jnp.moveaxis(alone, 0, 1),
        "conflict_uncertainty": jnp.maximum(entropy(full) - open_alone, 0.0),
    }


def blame(attribution: Float[Array, "b m *s"], present: Bool[Array, "b m"]) -> Int[Array, "b *s"]:
    """argmin over the available modalities of phi_m: the one that argues most against the delivered label
    (ours).
    """
    here = present.reshape(present.shape + (1,) * (attribution.ndim - 2))
    return jnp.argmin(jnp.where(here, attribution, jnp.inf), axis=1)
