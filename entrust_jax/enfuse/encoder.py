"""EnFuse's encoder: a private stem per modality, one shared trunk whose norm is conditioned on the modality.

    z_m = Stem_m(x_m)      h_m^s = Trunk_s(z_m; e_m)
    c_m = LN(W_c h_m)      u_m = W_u[m] h_m      r_m = MLP([h_m, H(p_m), e_m])      p_m = softmax(smooth(A c_m) + a_m)

No operation before `fusion` joins modalities, so each has evidence of its own and any subset can be fused afterwards.
Equations: ours; the parameter-lean relative of ShaSpec (Wang et al. 2023, arXiv 2307.14126).
"""

import math
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from entrust_jax.enfuse import conflict
from entrust_jax.layers import (
    Conv,
    Strides,
    background_bias,
    block,
    body_at_scales,
    cumulated,
    depth_to_space,
    layer_norm,
    pool,
    smooth,
    space_to_depth,
    upsample,
    upsample_linear,
)

PRIOR_FLOOR = 1e-3


# Its shapes are not checked at run time: JAX rebuilds a pytree with other leaves (numpy arrays, shardings).
@no_type_check
@flax.struct.dataclass
class Evidence:
    """What each modality says by itself. Made once a case; `fusion` joins any subset of it.

    Attributes:
      c: per scale, consensus features Float[b m *t d_c], in a space that the modalities share.
      u: per scale, specific features Float[b m *t d_u].
      reliability: per scale, logits Float[b m *t].
      logits: unimodal logits Float[b m *s k] at full resolution.
      prior_logits: of the positional base rate pi(u), Float[b *s k].
      body: 1 inside the body, 0 outside, where no modality shows anything: Float[b *s].
    """

    c: tuple[Float[Array, "b m ... _"], ...]
    u: tuple[Float[Array, "b m ... _"], ...]
    reliability: tuple[Float[Array, "b m ..."], ...]
    logits: Float[Array, "b m *s k"]
    prior_logits: Float[Array, "b *s k"]
    body: Float[Array, "b *s"]


class Stem(nn.Module):
    """Two 3x3 convolutions, private to one modality."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"], body: Float[Array, "b *s 1"]) -> Float[Array, "b *s w"]:
        return Conv(self.width)(nn.silu(Conv(self.width)(x)) * body) * body


class Trunk(nn.Module):
    """Down, then a light top-down path (1x1 laterals, add, one block), so that every scale sees context."""

    widths: tuple[int, ...]
    strides: Strides
    remat: bool = False

    @nn.compact
    def __call__(
        self, z: Float[Array, "b *s w"], body: list[Float[Array, "b ... 1"]], e: Float[Array, "b e"]
    ) -> list[Float[Array, "b ... _"]]:
        Block = block(self.remat)
        skips = []
        for s, width in enumerate(self.widths):
            if s:
                z = Conv(width, name=f"down_{s}")(pool(z, self.strides[s])) * body[s]
            z = Block(name=f"block_{s}")(z, body[s], e)
            skips.append(z)
        features = [z]
        for s in reversed(range(len(self.widths) - 1)):
            above = Conv(self.widths[s], 1, use_bias=False, name=f"up_{s}")(z)
            z = upsample_linear(above, self.strides[s + 1]) + Conv(self.widths[s], 1, name=f"lateral_{s}")(skips[s])
            z = Block(name=f"top_{s}")(z * body[s], body[s], e)
            features.insert(0, z)
        return features


class Prior(nn.Module):
    """pi(u) = softmax(MLP(body coordinates)): the base rate at a place of the body. It sees no image."""

    classes: int
    width: int = 32

    @nn.compact
    def __call__(self, coordinates: Float[Array, "b *s 3"]) -> Float[Array, "b *s k"]:
        u = jnp.clip(coordinates, -1.25, 1.25)
        waves = [f(jnp.pi * n * u) for n in (1.0, 2.0, 4.0) for f in (jnp.sin, jnp.cos)]
        h = jnp.concatenate([u, *waves], axis=-1)
        h = nn.silu(nn.Dense(self.width)(h))
        h = nn.silu(nn.Dense(self.width)(h))
        return nn.Dense(
            self.classes, kernel_init=nn.initializers.normal(0.01), bias_init=background_bias(self.classes)
        )(h)


def base_rate(prior_logits: Float[Array, "*a k"]) -> Float[Array, "*a k"]:
    """pi with its floor, and without gradient: the conflict may not move the prior."""
    p = jnp.maximum(jax.nn.softmax(jax.lax.stop_gradient(prior_logits), axis=-1), PRIOR_FLOOR)
    return p / jnp.sum(p, axis=-1, keepdims=True)


class Encoder(nn.Module):
    """Images to Evidence.

    Attributes:
      modalities, classes: M and K.
      widths: channels of the trunk, one entry a scale.
      d_c, d_u, d_e: channels of c_m, of u_m, and of the modality embedding e_m.
      strides: one factor an axis for every scale, the first that of the stem's space-to-depth.
      head_dropout: on the unimodal heads, while training: unimodal heads that fit the training set lose their conflict.
      compute: type of activations and convolutions; parameters, logits and norms' statistics stay float32.
      remat: blocks keep their inputs alone for the gradient.
    """

    modalities: int
    classes: int
    widths: tuple[int, ...]
    strides: Strides
    d_c: int = 16
    d_u: int = 8
    d_e: int = 32
    head_dropout: float = 0.2
    compute: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b m *s"],
        coordinates: Float[Array, "b *s 3"],
        body: Float[Array, "b *s"],
        *,
        train: bool = False,
    ) -> Evidence:
        b, m, *space = image.shape
        k, f = self.classes, self.strides[0]
        copies = math.prod(f)
        inside = body_at_scales(body.astype(self.compute), self.strides)
        shown = image.astype(self.compute)
        # One small call per stem: a vmap over stacked stems is a grouped convolution, which CPUs run badly.
        z = jnp.stack(
            [
                Stem(self.widths[0], name=f"stem_{i}")(space_to_depth(shown[:, i, ..., None], f), inside[0])
                for i in range(self.modalities)
            ],
            axis=1,
        )
        e = self.param("modality", nn.initializers.normal(1.0), (m, self.d_e))
        e_rows = jnp.broadcast_to(e[None], (b, m, self.d_e)).reshape(b * m, self.d_e)
        rows = [jnp.repeat(mask, m, axis=0) for mask in inside]
        trunk = Trunk(self.widths, self.strides, self.remat, name="trunk")
        features = trunk(z.reshape(b * m, *z.shape[2:]), rows, e_rows)

        c, u, reliability = [], [], []
        logits = None
        for s, h in enumerate(features):
            grid = h.shape[1:-1]
            c_s = layer_norm(Conv(self.d_c, 1, use_bias=False, name=f"consensus_{s}")(h))
            w_u = self.param(f"specific_{s}", nn.initializers.lecun_normal(batch_axis=0), (m, h.shape[-1], self.d_u))
            u_s = jnp.einsum("bm...h,mhd->bm...d", h.reshape(b, m, *grid, -1), w_u.astype(h.dtype))
            if logits is None:
                dropped = nn.Dropout(self.head_dropout, deterministic=not train)(c_s)
                said = Conv(k * copies, 1, use_bias=False, dtype=jnp.float32, name="unimodal")(dropped)
                a_m = self.param("unimodal_bias", _per_modality(background_bias(k)), (m, k))
                # Each voxel of a folded block has weights of its own: unsmoothed, p_m shows the block's pattern, and
                # kappa, which opposes the p_m, a chequerboard.
                said = smooth(depth_to_space(said, f), f)
                logits = said.reshape(b, m, *space, k) + a_m.reshape(1, m, *(1,) * len(space), k)
            uncertainty = jax.lax.stop_gradient(conflict.entropy(jax.nn.softmax(logits, axis=-1)))
            uncertainty = pool(uncertainty.reshape(b * m, *space, 1), cumulated(self.strides)[s]).astype(h.dtype)
            hidden = Conv(16, 1, name=f"reliability_{s}_features")(h)
            hidden += Conv(16, 1, use_bias=False, name=f"reliability_{s}_entropy")(uncertainty)
            rows_16 = nn.Dense(16, use_bias=False, dtype=h.dtype, name=f"reliability_{s}_modality")(e_rows)
            hidden += rows_16.reshape(b * m, *(1,) * len(space), 16)
            head = Conv(1, 1, kernel_init=nn.initializers.normal(0.01), dtype=jnp.float32, name=f"reliability_{s}")
            r = head(nn.silu(hidden))
            c.append(c_s.reshape(b, m, *grid, self.d_c))
            u.append(u_s)
            reliability.append(r.reshape(b, m, *grid))
        prior = Prior(k, name="prior")(pool(coordinates, f))
        assert logits is not None
        return Evidence(tuple(c), tuple(u), tuple(reliability), logits, upsample(prior, f), body)


def _per_modality(init):
    return lambda key, shape, dtype=jnp.float32: jnp.stack([init(key, shape[1:], dtype)] * shape[0])
