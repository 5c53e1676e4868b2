"""EnFuse's fusion: Evidence and what is available -> shared anatomy F_c, specific cues F_u, spatial conflict F_cf.

    w_m = mu_m exp(r_m) / sum_n mu_n exp(r_n)      F_c = sum_m w_m c_m      F_u,m = mu_m u_m
    delta = sum_m w_m (c_m - F_c)^2      dir = concat_m mu_m w_m (c_m - F_c)
    F_cf = g(kappa) psi([delta, dir, contested, kappa, JS, kappa_mn]),      psi(0) = 0

F_cf is exactly zero where the modalities agree or only one is there. Equations: ours; the weights follow the idea of
fusion by relevance and uncertainty of D-GUMM-DS (Mahapatra et al. 2026), of which we know a digest only.
"""

import math
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from entrust_jax.enfuse import conflict
from entrust_jax.enfuse.encoder import Evidence, base_rate
from entrust_jax.layers import (
    Conv,
    Factor,
    Strides,
    background_bias,
    cumulated,
    depth_to_space,
    per_voxel,
    pool,
    upsample,
)


# Its shapes are not checked at run time: JAX rebuilds a pytree with other leaves (numpy arrays, shardings).
@no_type_check
@flax.struct.dataclass
class Fused:
    """The decomposition, per scale, and the conflict maps at full resolution (kappa from stopped gradients)."""

    F_c: tuple[Float[Array, "b ... _"], ...]
    F_u: tuple[Float[Array, "b m ... _"], ...]
    F_cf: tuple[Float[Array, "b ... _"], ...]
    weights: Float[Array, "b m *s"]
    posterior: Float[Array, "b m *s k"]
    support: Float[Array, "b m *s k"]
    kappa: Float[Array, "b *s"]
    kappa_pairs: Float[Array, "b p *s"]
    js: Float[Array, "b *s"]
    present: Float[Array, "b m"]


def masked_softmax(r: Float[Array, "b m *t"], mu: Float[Array, "b m *t"]) -> Float[Array, "b m *t"]:
    """mu_m exp(r_m) / sum_n mu_n exp(r_n); all zero where nothing is available."""
    r = jnp.where(mu > 0, r, -1e9)
    e = mu * jnp.exp(r - jax.lax.stop_gradient(jnp.max(r, axis=1, keepdims=True)))
    return e / (jnp.sum(e, axis=1, keepdims=True) + 1e-9)


def pool_maps(x: Float[Array, "b c *s"], factor: Factor, reduce=jnp.mean) -> Float[Array, "b c *t"]:
    """`pool` for maps whose second axis counts modalities, pairs or classes."""
    b, c, *space = x.shape
    y = pool(x.reshape(b * c, *space, 1), factor, reduce)
    return y.reshape(b, c, *y.shape[1:-1])


class Fusion(nn.Module):
    """Joins any subset of the evidence. `d_f`: channels of F_cf; `strides`: as in the encoder."""

    d_f: int
    strides: Strides

    @nn.compact
    def __call__(
        self,
        evidence: Evidence,
        availability: Float[Array, "b m *s"],
        *,
        rho: Float[Array, ""] | float = 0.0,
        conflict_scale: Float[Array, " b"] | None = None,
    ) -> Fused:
        """Args:
        availability: mu in [0, 1], by voxel (silencing a region of one modality is a local subset); outside the body
          no modality has anything to say.
        rho: opens the conflict gate everywhere early in training, so that psi gets gradients; 0 afterwards.
        conflict_scale: factor on F_cf per case (0 removes the conflict pathway).
        """
        present = jnp.max(availability, axis=tuple(range(2, availability.ndim)))
        availability = availability * evidence.body[:, None]
        posterior = jax.nn.softmax(jax.lax.stop_gradient(evidence.logits), axis=-1)
        s = conflict.support(posterior, base_rate(evidence.prior_logits))
        kappa_pairs, contested, kappa, js = self.opposition(posterior, s, availability)
        # Channel maps of q that exist at full resolution, pooled once a scale.
        maps = jnp.concatenate([jnp.moveaxis(contested, -1, 1), kappa[:, None], js[:, None], kappa_pairs], axis=1)
        b, m = availability.shape[:2]
        F_c, F_u, F_cf = [], [], []
        weights = None
        for scale, (c, u, r) in enumerate(zip(evidence.c, evidence.u, evidence.reliability, strict=True)):
            factor = cumulated(self.strides)[scale]
            mu = pool_maps(availability, factor)
            share = masked_softmax(r, mu)
            if weights is None:
                weights = share
            mu, w = mu.astype(c.dtype), share.astype(c.dtype)
            F = jnp.sum(w[..., None] * c, axis=1)
            deviation = c - F[:, None]
            delta = jnp.sum(w[..., None] * jnp.square(deviation), axis=1)
            direction = (mu * w)[..., None] * deviation
            direction = jnp.moveaxis(direction, 1, -2).reshape(b, *F.shape[1:-1], -1)
            seen = jnp.moveaxis(pool_maps(maps, factor), 1, -1).astype(c.dtype)
            q = jnp.concatenate([delta, direction, seen], axis=-1)
            hidden = nn.gelu(Conv(self.d_f, 1, use_bias=False, name=f"psi_{scale}_in")(q))
            psi = Conv(self.d_f, use_bias=False, name=f"psi_{scale}_out")(hidden)
            g = conflict.gate(pool(kappa[..., None], factor, jnp.max), rho)
            if conflict_scale is not None:
                g = g * per_voxel(conflict_scale[:, None], g.ndim)
            F_c.append(F)
            F_u.append(mu[..., None] * u)
            F_cf.append(g.astype(psi.dtype) * psi)
        assert weights is not None
        weights = weights.reshape(b * m, *weights.shape[2:], 1)
        weights = upsample(weights, self.strides[0]).reshape(availability.shape)
        return Fused(tuple(F_c), tuple(F_u), tuple(F_cf), weights, posterior, s, kappa, kappa_pairs, js, present)

    def opposition(
        self,
        posterior: Float[Array, "b m *s k"],
        support: Float[Array, "b m *s k"],
        availability: Float[Array, "b m *s"],
    ) -> tuple[Float[Array, "b p *s"], Float[Array, "b *s k"], Float[Array, "b *s"], Float[Array, "b *s"]]:
        """How the modalities disagree: kappa_mn, how contested each class is, kappa, JS."""
        kappa_pairs, contested = conflict.pair_conflict(support, availability)
        js = conflict.jensen_shannon(posterior, availability)
        return kappa_pairs, contested, conflict.strongest(kappa_pairs), js


class Auxiliary(nn.Module):
    """Heads that only training uses: the consensus must segment, c and u together must redraw the image."""

    classes: int
    strides: Strides
    d_e: int = 32

    @nn.compact
    def __call__(
        self,
        fused: Fused,
        consensus: Float[Array, "b m *t d"],
        specific: Float[Array, "b m *t e"],
    ) -> tuple[Float[Array, "b *s k"], Float[Array, "b m *t"]]:
        """Consensus logits A' F_c at full resolution, and the image of each modality at the scale of `consensus`."""
        F = fused.F_c[0]
        k = self.classes
        copies = math.prod(self.strides[0])
        logits = Conv(k * copies, 1, bias_init=background_bias(k, copies), dtype=jnp.float32, name="consensus")(F)
        b, m, *grid, _ = consensus.shape
        e = self.param("modality", nn.initializers.normal(1.0), (m, self.d_e))
        x = jnp.concatenate([consensus, specific], axis=-1).reshape(b * m, *grid, -1)
        hidden = Conv(16, name="reconstruct_in")(x)
        rows = jnp.broadcast_to(nn.Dense(16, dtype=x.dtype, name="reconstruct_modality")(e)[None], (b, m, 16))
        hidden = nn.silu(hidden + rows.reshape(b * m, *(1,) * len(grid), 16))
        image = Conv(1, dtype=jnp.float32, name="reconstruct_out")(hidden).reshape(b, m, *grid)
        return depth_to_space(logits, self.strides[0]), image
