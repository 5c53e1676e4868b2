"""Linen blocks that several networks share. Channels last; the number of spatial axes is read from the input."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply` of a module without mutable collections: its output alone, which flax's own type cannot say."""
    return module.apply(params, *args, **kwargs)


def rms_norm(x: Float[Array, "*a c"], epsilon: float = 1e-6) -> Float[Array, "*a c"]:
    """x / rms of its channels, voxel by voxel (Zhang & Sennrich 2019, without the gain).

    Statistics over space would change with padding, buckets and windows; these do not.
    """
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def layer_norm(x: Float[Array, "*a c"], epsilon: float = 1e-6) -> Float[Array, "*a c"]:
    """Zero mean and unit variance over the channels of each voxel, without gain or offset."""
    return rms_norm(x - jnp.mean(x, axis=-1, keepdims=True), epsilon)


def space_to_depth(x: Float[Array, "b *s c"], factor: int) -> Float[Array, "b *t d"]:
    """Folds blocks of `factor` voxels along every spatial axis into channels (no copy of information is lost)."""
    if factor == 1:
        return x
    b, *space, c = x.shape
    n = len(space)
    split = [size for s in space for size in (s // factor, factor)]
    x = x.reshape(b, *split, c)
    x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(b, *(s // factor for s in space), factor**n * c)


def depth_to_space(x: Float[Array, "b *t d"], factor: int) -> Float[Array, "b *s c"]:
    """Inverse of `space_to_depth`."""
    if factor == 1:
        return x
    b, *space, d = x.shape
    n = len(space)
    x = x.reshape(b, *space, *(factor,) * n, d // factor**n)
    x = x.transpose(0, *(axis for i in range(n) for axis in (1 + i, 1 + n + i)), 2 * n + 1)
    return x.reshape(b, *(s * factor for s in space), d // factor**n)


def pool(x: Float[Array, "b *s c"], factor: int, reduce=jnp.mean) -> Float[Array, "b *t c"]:
    """Reduces blocks of `factor` voxels along every spatial axis (mean by default)."""
    if factor == 1:
        return x
    b, *space, c = x.shape
    blocks = x.reshape(b, *(size for s in space for size in (s // factor, factor)), c)
    return reduce(blocks, axis=tuple(range(2, 2 * len(space) + 1, 2)))


def upsample(x: Float[Array, "b *s c"], factor: int = 2) -> Float[Array, "b *t c"]:
    """Nearest-neighbour upsampling by broadcasting: its gradient is a sum, cheaper than that of a resize."""
    if factor == 1:
        return x
    b, *space, c = x.shape
    n = len(space)
    x = x.reshape(b, *(size for s in space for size in (s, 1)), c)
    x = jnp.broadcast_to(x, (b, *(size for s in space for size in (s, factor)), c))
    return x.reshape(b, *(space[i] * factor for i in range(n)), c)


def upsample_linear(x: Float[Array, "b *s c"]) -> Float[Array, "b *t c"]:
    """Linear upsampling by 2 along every spatial axis, zero beyond the border, where air would be zero too.

    Nearest neighbours smoothed by [1, 2, 1] / 4 are the same thing, and shifts and sums are cheap to differentiate.
    """
    x = upsample(x)
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        padded = jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)])
        before, after = (jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in (0, 2))
        x = 0.5 * x + 0.25 * (before + after)
    return x


def body_at_scales(body: Float[Array, "b *s"], factor: int, scales: int) -> list[Float[Array, "b ... 1"]]:
    """The body mask at every scale of a network with that space-to-depth factor: 1 where any of its voxels is body.

    Features are kept at zero outside it. A convolution pads with zeros, so air around the body is as if it were not
    there, however much of it a scan, a patch or a padded batch has.
    """
    masks = [pool(body[..., None], factor, jnp.max)]
    while len(masks) < scales:
        masks.append(pool(masks[-1], 2, jnp.max))
    return masks


def embed_log_snr(log_snr: Float[Array, " b"], size: int) -> Float[Array, "b e"]:
    """Sinusoids of half the log SNR at geometrically spaced frequencies."""
    frequencies = jnp.exp(jnp.linspace(jnp.log(0.05), jnp.log(4.0), size // 2)).astype(jnp.float32)
    angle = 0.5 * log_snr[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def per_voxel(v: Float[Array, "b c"], ndim: int) -> Float[Array, "b *s c"]:
    """Gives a per-case vector singleton spatial axes so that it broadcasts over an array of rank `ndim`."""
    return v.reshape(v.shape[0], *(1,) * (ndim - 2), v.shape[-1])


class Conv(nn.Module):
    """Same-padded convolution with a cubic kernel over all the spatial axes."""

    features: int
    size: int = 3
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *s d"]:
        if self.size == 1:  # a matrix product: faster than a 1x1 convolution on CPU
            return nn.Dense(
                self.features, use_bias=self.use_bias, kernel_init=self.kernel_init, bias_init=self.bias_init
            )(x)
        kernel = (self.size,) * (x.ndim - 2)
        return nn.Conv(
            self.features, kernel, use_bias=self.use_bias, kernel_init=self.kernel_init, bias_init=self.bias_init
        )(x)


class Block(nn.Module):
    """h + conv(silu(norm(h) (1 + gamma + spatial) + beta)) inside the body, 0 outside.

    gamma and beta come from an embedding of the case, which may be absent; the second factor of the modulation,
    `spatial`, is per voxel (SPADE, Park et al. 2019).
    """

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b *s c"],
        body: Float[Array, "b *s 1"],
        embedding: Float[Array, "b e"] | None = None,
        spatial: Float[Array, "b *s c"] | None = None,
    ) -> Float[Array, "b *s c"]:
        c = h.shape[-1]
        g = rms_norm(h)
        gain = jnp.ones((h.shape[0], c), h.dtype)
        shift = self.param("shift", nn.initializers.zeros_init(), (c,))
        shift = jnp.broadcast_to(shift[None], gain.shape)
        if embedding is not None:
            film = nn.Dense(2 * c, kernel_init=nn.initializers.normal(0.01), name="film")(embedding)
            gain, shift = gain + film[:, :c], shift + film[:, c:]
        gain = per_voxel(gain, h.ndim)
        if spatial is not None:
            gain = gain + spatial
        g = g * gain + per_voxel(shift, h.ndim)
        small = nn.initializers.variance_scaling(0.5, "fan_in", "normal")
        return (h + Conv(c, kernel_init=small)(nn.silu(g) * body)) * body


def background_bias(classes: int, copies: int = 1, value: float = 3.0) -> nn.initializers.Initializer:
    """Initial logits that favour background, the commonest class, so that the first steps do not learn only that.

    `copies` voxels share one bias vector (space-to-depth puts the classes of a block's voxels side by side).
    """

    def init(key, shape: Sequence[int], dtype=jnp.float32):
        del key
        one = jnp.zeros((classes,), dtype).at[0].set(value)
        return jnp.tile(one, copies).reshape(tuple(shape))

    return init
