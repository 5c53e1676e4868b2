"""EnFuse's objective: grounded unimodal posteriors, a predictive consensus, independent parts, no collapse.

    L_fuse = L_uni + .5 L_con + .1 L_align + L_xcov + .1 L_var + .1 L_rec (+ L_pi in stage 1)

The cross-covariance penalty is that of Cheung et al. 2014 (arXiv 1412.6583) in a scale-free form, the variance hinge
that of VICReg (Bardes et al. 2021, arXiv 2105.04906). Weights and the rest: ours.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from entrust_jax.scores import case_mean, cross_entropy, over_cases

VARIANCE_FLOOR = 1e-4
ACTIVE_KAPPA = 0.1  # F_cf must vary where conflict is above this
ACTIVE_VOXELS = 64  # ... if there are so many of them

PAIR_WEIGHTS = {"F_c,u": 1.0, "c,u": 1.0, "u,F_cf": 0.5, "F_c,F_cf": 0.25, "u,u": 0.25}
WEIGHTS = {"uni": 1.0, "con": 0.5, "align": 0.1, "xcov": 1.0, "var": 0.1, "rec": 0.1, "prior": 1.0}


def xcov(y: Float[Array, "n d"], z: Float[Array, "n e"], mask: Float[Array, " n"]) -> Float[Array, ""]:
    """Mean squared correlation between the channels of y and of z over the samples with mask 1.

    l = 1/(d e) sum_ij C_ij^2 / (max(var y_i, 1e-4) max(var z_j, 1e-4)); two-pass centring. Gradients flow through the
    variances: with them stopped the value is scale-free but its gradient still shrinks the features.
    """
    k = mask[:, None]
    n = jnp.maximum(jnp.sum(k), 1.0)
    yc = (y - jnp.sum(k * y, axis=0, keepdims=True) / n) * k
    zc = (z - jnp.sum(k * z, axis=0, keepdims=True) / n) * k
    covariance = yc.T @ zc / n
    vy = jnp.maximum(jnp.sum(jnp.square(yc), axis=0) / n, VARIANCE_FLOOR)
    vz = jnp.maximum(jnp.sum(jnp.square(zc), axis=0) / n, VARIANCE_FLOOR)
    return jnp.mean(jnp.square(covariance) / (vy[:, None] * vz[None]))


def centred_per_case(x: Float[Array, "b n d"], mask: Float[Array, "b n"]) -> Float[Array, "b n d"]:
    """x less the mean of its own case: without it between-case intensity offsets dominate the covariance."""
    n = jnp.maximum(jnp.sum(mask, axis=1)[:, None, None], 1.0)
    return x - jnp.sum(mask[..., None] * x, axis=1, keepdims=True) / n


def _two_centrings(y: Float[Array, "b n d"], z: Float[Array, "b n e"], mask: Float[Array, "b n"]) -> Float[Array, ""]:
    both_y = jnp.stack([y, centred_per_case(y, mask)]).reshape(2, -1, y.shape[-1])
    both_z = jnp.stack([z, centred_per_case(z, mask)]).reshape(2, -1, z.shape[-1])
    return jnp.mean(jax.vmap(xcov, in_axes=(0, 0, None))(both_y, both_z, mask.reshape(-1)))


def independence(
    F_c: Float[Array, "b n d"],
    F_cf: Float[Array, "b n d"],
    c: Float[Array, "m b n d"],
    u: Float[Array, "m b n e"],
    mask: Float[Array, "b n"],
    present: Float[Array, "m b"],
) -> Float[Array, ""]:
    """L_xcov of one scale: weighted mean of `xcov` over (F_c,u_m), (c_m,u_m), (u_m,F_cf), (F_c,F_cf) and (u_m,u_n)."""
    masks = mask[None] * present[..., None]
    each = jax.vmap(_two_centrings)
    m = u.shape[0]
    # The three pairs with u_m have equal shapes: one call, for every copy of it is compiled with its gradient.
    left = jnp.concatenate([jnp.broadcast_to(F_c[None], c.shape), c, jnp.broadcast_to(F_cf[None], c.shape)])
    weight = jnp.repeat(jnp.array([PAIR_WEIGHTS["F_c,u"], PAIR_WEIGHTS["c,u"], PAIR_WEIGHTS["u,F_cf"]]), m)
    total = jnp.sum(weight * each(left, jnp.concatenate([u, u, u]), jnp.concatenate([masks, masks, masks])))
    total += PAIR_WEIGHTS["F_c,F_cf"] * _two_centrings(F_c, F_cf, mask)
    count = 3 * m + 1
    first, second = jnp.triu_indices(m, 1)
    if len(first):
        total += PAIR_WEIGHTS["u,u"] * jnp.sum(each(u[first], u[second], masks[first] * masks[second]))
        count += len(first)
    return total / count


def variance_hinge(x: Float[Array, "n d"], mask: Float[Array, " n"]) -> Float[Array, " d"]:
    """max(0, 1 - std) of each channel: keeps a part from shrinking to nothing."""
    k = mask[:, None]
    n = jnp.maximum(jnp.sum(k), 1.0)
    mean = jnp.sum(k * x, axis=0, keepdims=True) / n
    variance = jnp.sum(k * jnp.square(x - mean), axis=0) / n
    return jnp.maximum(0.0, 1 - jnp.sqrt(variance + VARIANCE_FLOOR))


def alignment(
    c: Float[Array, "m b n d"],
    kappa_pairs: Float[Array, "p b n"],
    mask: Float[Array, "b n"],
    present: Float[Array, "m b"],
) -> Float[Array, ""]:
    """mean (1 - kappa_mn) sqrt(|c_m - c_n|^2 / d + 1e-3): aligns only where there is no conflict.

    Ungated it would train the disagreement away.
    """
    first, second = jnp.triu_indices(c.shape[0], 1)
    if not len(first):
        return jnp.zeros(())
    distance = jnp.sqrt(jnp.mean(jnp.square(c[first] - c[second]), axis=-1) + 1e-3)
    weight = (present[first] * present[second])[..., None] * mask[None]
    value = (1 - jax.lax.stop_gradient(kappa_pairs)) * distance
    return jnp.sum(weight * value) / jnp.maximum(jnp.sum(weight), 1.0)


def unimodal(
    logits: Float[Array, "b m *s k"],
    label: Int[Array, "b *s"],
    body: Float[Array, "b *s"],
    present: Float[Array, "b m"],
    weight: Float[Array, " b"],
) -> Float[Array, ""]:
    """L_uni = 1/sum(mu) sum_m mu_m CE(p_m, y): a proper score without class weights, so p_m estimates p(y | x_m)."""
    per_modality = jax.vmap(lambda x: case_mean(cross_entropy(x, label), body), in_axes=1, out_axes=1)(logits)
    mean = jnp.sum(present * per_modality, axis=1) / jnp.maximum(jnp.sum(present, axis=1), 1.0)
    return over_cases(mean, weight)


def total(terms: dict[str, Float[Array, ""]], xcov_ramp: Float[Array, ""] | float = 1.0) -> Float[Array, ""]:
    """L_fuse from its terms; the independence term is ramped in at the start of stage 1."""
    scale = {"xcov": xcov_ramp}
    return jnp.sum(jnp.stack([WEIGHTS[name] * scale.get(name, 1.0) * value for name, value in terms.items()]))


def modality_dropout(key: Array, present: Bool[Array, "b m"]) -> Bool[Array, "b m"]:
    """With p = .5 all the present modalities, else a uniform random non-empty subset of them."""
    k_all, k_subset = jax.random.split(key)
    b, m = present.shape
    table = ((jnp.arange(1, 2**m)[:, None] >> jnp.arange(m)[None]) & 1).astype(bool)
    allowed = ~jnp.any(table[None] & ~present[:, None], axis=-1)
    score = jnp.where(allowed, jax.random.uniform(k_subset, (b, 2**m - 1)), -1.0)
    keep_all = jax.random.bernoulli(k_all, 0.5, (b, 1))
    return jnp.where(keep_all, present, table[jnp.argmax(score, axis=1)] & present)


def availability_dropout(
    key: Array, present: Bool[Array, "b m"], space: tuple[int, ...], null: Bool[Array, " b"]
) -> tuple[Float[Array, "b m *s"], Float[Array, " b"]]:
    """Draws what the model may see: modality dropout, local silencing, conflict-pathway dropout.

    Whole modalities go by `modality_dropout`; the cases of `null` lose all. Another 10 % lose one modality inside a
    random ellipsoid, 10 % lose F_cf. Thereby every condition that probing will ask about is in the training
    distribution.

    Returns mu Float[b m *s] and the factor on F_cf Float[b].
    """
    b, m = present.shape
    k_subset, k_blob, k_centre, k_radius, k_which, k_cf = jax.random.split(key, 6)
    mu = modality_dropout(k_subset, present) & ~null[:, None]

    n = len(space)
    axes = [jnp.linspace(-1, 1, size) for size in space]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)
    centre = jax.random.uniform(k_centre, (b, *(1,) * n, n), minval=-0.8, maxval=0.8)
    radius = jax.random.uniform(k_radius, (b, *(1,) * n), minval=0.1, maxval=0.5)
    ball = jnp.sum(jnp.square(grid[None] - centre), axis=-1) < jnp.square(radius)
    hit = jax.random.bernoulli(k_blob, 0.1, (b,))
    which = jax.nn.one_hot(jax.random.randint(k_which, (b,), 0, m), m, dtype=bool)
    silenced = (hit[:, None] & which).reshape(b, m, *(1,) * n) & ball[:, None]
    local = mu.reshape(b, m, *(1,) * n) & ~silenced
    conflict_scale = 1.0 - jax.random.bernoulli(k_cf, 0.1, (b,))
    return local.astype(jnp.float32), conflict_scale.astype(jnp.float32)
