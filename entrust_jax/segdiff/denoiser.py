"""SegDiff's denoiser: a light U-Net on the noisy one-hot mask, conditioned on EnFuse's parts.

All modality work is done once: the condition enters as per-scale sums computed by `Projection` and cached,

    a_s = W_c' F_c + W_u' sum_m P_m F_u,m + W_f' F_cf        G_s = Gf F_cf (zero at initialisation)
    at a block's entry h <- conv(h) + a_s;   inside h <- h + conv(silu(norm(h)(1 + gamma(lambda) + G_s) + beta(lambda)))

so that neither steps nor hypotheses repeat it. A structure of n voxels is decided where noise hides each of its voxels
(`schedule.decision_log_snr`), so every coarser scale is given what the noisy mask says of its own voxels (`seen_at`),
and what noisy values say exactly is added to the logits, a voxel's own and those of the blocks s that it lies in,

    logits(u) = rest(u) + e(u) + sum_s reach_s(u) BOUND tanh( sum_{v in block_s(u)} e(v) / BOUND ),    e = own evidence

as far as the network takes them for one structure with it. Equations: ours; spatial modulation as in SPADE (Park et al.
2019).
"""

import math
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from entrust_jax.layers import (
    Conv,
    Factor,
    Strides,
    background_bias,
    block,
    body_at_scales,
    cumulated,
    depth_to_space,
    embed_log_snr,
    pool,
    rms_norm,
    space_to_depth,
    upsample,
    upsample_linear,
)
from entrust_jax.segdiff.schedule import input_scale, own_evidence, per_case

BOUND = 4.0  # nats of each class's logit that a block may say at most, at a reach of 1


# Its shapes are not checked at run time: JAX rebuilds a pytree with other leaves (numpy arrays, shardings).
@no_type_check
@flax.struct.dataclass
class Projections:
    """The cached half of the denoiser: per scale a_s and G_s Float[b *t w_s], the embedding of what is there, and

    where the body is, Float[b *s].
    """

    a: tuple[Float[Array, "b ... _"], ...]
    modulation: tuple[Float[Array, "b ... _"], ...]
    embedding: Float[Array, "b e"]
    body: Float[Array, "b *s"]


class Projection(nn.Module):
    """F_c, F_u, F_cf and the modalities present -> Projections. 1x1 maps only."""

    widths: tuple[int, ...]
    d_embedding: int

    @nn.compact
    def __call__(
        self,
        F_c: tuple[Float[Array, "b ... _"], ...],
        F_u: tuple[Float[Array, "b m ... _"], ...],
        F_cf: tuple[Float[Array, "b ... _"], ...],
        present: Float[Array, "b m"],
        body: Float[Array, "b *s"],
    ) -> Projections:
        a, modulation = [], []
        for s, width in enumerate(self.widths):
            u = F_u[s]
            mix = self.param(
                f"specific_{s}", nn.initializers.lecun_normal(batch_axis=0), (u.shape[1], u.shape[-1], u.shape[-1])
            )
            specific = jnp.einsum("bm...d,mde->b...e", u, mix.astype(u.dtype))
            a.append(
                Conv(width, 1, name=f"consensus_{s}")(F_c[s])
                + Conv(width, 1, use_bias=False, name=f"cue_{s}")(specific)
                + Conv(width, 1, use_bias=False, name=f"conflict_{s}")(F_cf[s])
            )
            modulation.append(
                Conv(width, 1, use_bias=False, kernel_init=nn.initializers.zeros_init(), name=f"gain_{s}")(F_cf[s])
            )
        e = self.param("modality", nn.initializers.normal(0.5), (present.shape[1], self.d_embedding))
        return Projections(tuple(a), tuple(modulation), present @ e, body)


def seen_at(x_t: Float[Array, "b *s k"], log_snr: Float[Array, " b"], b: float, factor: Factor = ()) -> Array:
    """The noisy mask in voxels of n = prod(factor) of its own, [b *t k]: their mean, times

        sqrt(n / (alpha^2 b^2 n + sigma^2)).

    Noise and uniform masks have unit second moment, and what tells two uniform masks apart stands 2 alpha b sqrt(n) /
    sigma above the noise, as it never does in one voxel.
    """
    root = math.sqrt(math.prod(factor))
    return pool(x_t, factor) * per_case(root * input_scale(log_snr, root * b), x_t.ndim)


def bounded(together: Float[Array, "b *t k"]) -> Float[Array, "b *t k"]:
    """What a block says of its common class, were it one: the sum of what its voxels say by their noisy values

    (`schedule.own_evidence`). Each class's logit is bounded: where a block has more than one class a sum of thousands
    is false.
    """
    return BOUND * jnp.tanh(together / BOUND)


class Denoiser(nn.Module):
    """Den(x_t, lambda, condition) -> logits of x_0.

    Attributes:
      classes: K. widths: channels per scale. b: scale of the one-hot input.
      strides, compute, remat: as the encoder's.
      d_embedding: channels of the embedding of lambda and of the modalities present.
    """

    classes: int
    widths: tuple[int, ...]
    b: float
    strides: Strides
    d_embedding: int = 64
    compute: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "b *s k"], log_snr: Float[Array, " b"], condition: Projections
    ) -> Float[Array, "b *s k"]:
        """Returns float32 logits; the network's input has unit variance at every log SNR.

        What noisy values say is added exactly, so the network learns the rest: without it a short training has not
        learnt to copy by the last steps, where little else is asked, nor to hear a structure under the noise.
        """
        body = body_at_scales(condition.body.astype(self.compute), self.strides)
        inside = x_t * condition.body[..., None]
        h = space_to_depth(seen_at(inside, log_snr, self.b).astype(self.compute), self.strides[0])
        e = nn.Dense(self.d_embedding)(embed_log_snr(log_snr, self.d_embedding)) + condition.embedding
        e = nn.silu(nn.Dense(self.d_embedding)(nn.silu(e)))

        Block = block(self.remat)
        skips = []
        for s, (width, factor) in enumerate(zip(self.widths, cumulated(self.strides), strict=True)):
            if s:
                seen = seen_at(inside, log_snr, self.b, factor).astype(self.compute)
                h = jnp.concatenate([pool(h, self.strides[s]), seen], axis=-1)
            h = (Conv(width, name=f"enter_{s}")(h) + condition.a[s]) * body[s]
            h = Block(name=f"down_{s}_0")(h, body[s], e, condition.modulation[s])
            h = Block(name=f"down_{s}_1")(h, body[s], e, condition.modulation[s])
            skips.append(h)
        for s in reversed(range(len(self.widths) - 1)):
            h = upsample_linear(Conv(self.widths[s], 1, use_bias=False, name=f"up_{s}")(h), self.strides[s + 1])
            h = (h + Conv(self.widths[s], 1, name=f"lateral_{s}")(skips[s])) * body[s]
            h = Block(name=f"top_{s}")(h, body[s], e, condition.modulation[s])
        copies = math.prod(self.strides[0])
        h, zeros = nn.silu(rms_norm(h)), nn.initializers.zeros_init()
        bias = background_bias(self.classes, copies)
        last = Conv(self.classes * copies, kernel_init=zeros, bias_init=bias, dtype=jnp.float32, name="logits")(h)
        rest = depth_to_space(last, self.strides[0])
        reach = Conv(len(self.widths), 1, kernel_init=zeros, dtype=jnp.float32, name="reach")(h)
        return rest + self.evidence(x_t, log_snr, reach, condition.body, body)

    def evidence(
        self,
        x_t: Float[Array, "b *s k"],
        log_snr: Float[Array, " b"],
        reach: Float[Array, "b *t scales"],
        inside: Float[Array, "b *s"],
        body: list[Float[Array, "b ... 1"]],
    ) -> Float[Array, "b *s k"]:
        """What noisy values say of a voxel, as logits: its own, and those of the blocks around it within its reach.

        inside: the body, voxel by voxel; body: at every scale (`body_at_scales`).
        """
        own = own_evidence(x_t, log_snr, self.b)
        around, together = jnp.zeros(()), own * inside[..., None]
        for s, factor in enumerate(self.strides):
            together = pool(together, factor, jnp.sum)
            block = bounded(together)
            for finer in reversed(range(s)):
                block = upsample_linear(block, self.strides[finer + 1]) * body[finer]
            around = around + reach[..., s, None] * block
        return own + upsample(around, self.strides[0])
