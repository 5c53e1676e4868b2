"""Linen blocks that several networks share. Channels last; the number of spatial axes is read from the input."""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Factor = tuple[int, ...]  # one a spatial axis: voxels that become one
Strides = tuple[Factor, ...]  # one a scale: the first of the space-to-depth, the others of the pooling before the scale


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply` of a module without mutable collections: its output alone, which flax's own type cannot say."""
    return module.apply(params, *args, **kwargs)


def rms_norm(x: Float[Array, "*a c"], epsilon: float = 1e-6) -> Float[Array, "*a c"]:
    """x / rms of its channels, voxel by voxel (Zhang & Sennrich 2019, without the gain).

    Statistics over space would change with padding, buckets and windows; these do not. They are float32 whatever x is.
    """
    power = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(power + epsilon).astype(x.dtype)


def layer_norm(x: Float[Array, "*a c"], epsilon: float = 1e-6) -> Float[Array, "*a c"]:
    """Zero mean and unit variance over the channels of each voxel, without gain or offset."""
    y = x.astype(jnp.float32)
    return rms_norm(y - jnp.mean(y, axis=-1, keepdims=True), epsilon).astype(x.dtype)


def cumulated(strides: Strides) -> Strides:
    """Voxels of the input along each axis of one voxel of every scale: the products of the strides so far."""
    return tuple(itertools.accumulate(strides, lambda above, own: tuple(map(operator.mul, above, own))))


def space_to_depth(x: Float[Array, "b *s c"], factor: Factor) -> Float[Array, "b *t d"]:
    """Folds blocks of `factor` voxels into channels (no copy of information is lost)."""
    if math.prod(factor) == 1:
        return x
    b, *space, c = x.shape
    n = len(space)
    split = [size for s, f in zip(space, factor, strict=True) for size in (s // f, f)]
    x = x.reshape(b, *split, c)
    x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(b, *split[::2], math.prod(factor) * c)


def depth_to_space(x: Float[Array, "b *t d"], factor: Factor) -> Float[Array, "b *s c"]:
    """Inverse of `space_to_depth`."""
    copies = math.prod(factor)
    if copies == 1:
        return x
    b, *space, d = x.shape
    n = len(space)
    x = x.reshape(b, *space, *factor, d // copies)
    x = x.transpose(0, *(axis for i in range(n) for axis in (1 + i, 1 + n + i)), 2 * n + 1)
    return x.reshape(b, *(s * f for s, f in zip(space, factor, strict=True)), d // copies)


def pool(x: Float[Array, "b *s c"], factor: Factor, reduce=jnp.mean) -> Float[Array, "b *t c"]:
    """Reduces blocks of `factor` voxels (mean by default)."""
    if math.prod(factor) == 1:
        return x
    b, *space, c = x.shape
    blocks = x.reshape(b, *(size for s, f in zip(space, factor, strict=True) for size in (s // f, f)), c)
    return reduce(blocks, axis=tuple(range(2, 2 * len(space) + 1, 2)))


def upsample(x: Float[Array, "b *s c"], factor: Factor) -> Float[Array, "b *t c"]:
    """Nearest-neighbour upsampling by broadcasting: its gradient is a sum, cheaper than that of a resize."""
    if math.prod(factor) == 1:
        return x
    b, *space, c = x.shape
    x = x.reshape(b, *(size for s in space for size in (s, 1)), c)
    x = jnp.broadcast_to(x, (b, *(size for s, f in zip(space, factor, strict=True) for size in (s, f)), c))
    return x.reshape(b, *(s * f for s, f in zip(space, factor, strict=True)), c)


def smooth(x: Float[Array, "b *s c"], factor: Factor) -> Float[Array, "b *s c"]:
    """Triangular mean over 2 f - 1 voxels along every axis of factor f, zero beyond the border, where air is zero too.

    It takes away what repeats every f voxels, a chequerboard for f = 2. Shifts and sums are cheap to differentiate.
    """
    for axis, f in enumerate(factor, 1):
        if f == 1:
            continue
        size, reach = x.shape[axis], f - 1
        padded = jnp.pad(x, [(reach * (i == axis),) * 2 for i in range(x.ndim)])
        mean = x / f
        for j in range(1, f):
            before, after = (jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in (reach - j, reach + j))
            mean = mean + (f - j) / f**2 * (before + after)
        x = mean
    return x


def upsample_linear(x: Float[Array, "b *s c"], factor: Factor) -> Float[Array, "b *t c"]:
    """Linear upsampling by 2 along the axes whose factor is 2, zero beyond the border: nearest neighbours, smoothed.

    A factor of 4 is twice one of 2, and so on: smoother than one linear step.
    """
    while math.prod(factor) > 1:
        twice = tuple(min(f, 2) for f in factor)
        x = smooth(upsample(x, twice), twice)
        factor = tuple(f // t for f, t in zip(factor, twice, strict=True))
    return x


def body_at_scales(body: Float[Array, "b *s"], strides: Strides) -> list[Float[Array, "b ... 1"]]:
    """The body mask at every scale of a network: 1 where any of its voxels is body.

    Features are kept at zero outside it. A convolution pads with zeros, so air around the body is as if it were not
    there, however much of it a scan, a patch or a padded batch has.
    """
    masks = [pool(body[..., None], strides[0], jnp.max)]
    for factor in strides[1:]:
        masks.append(pool(masks[-1], factor, jnp.max))
    return masks


def embed_log_snr(log_snr: Float[Array, " b"], size: int) -> Float[Array, "b e"]:
    """Sinusoids of half the log SNR at geometrically spaced frequencies."""
    frequencies = jnp.exp(jnp.linspace(jnp.log(0.05), jnp.log(4.0), size // 2)).astype(jnp.float32)
    angle = 0.5 * log_snr[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def per_voxel(v: Float[Array, "b c"], ndim: int) -> Float[Array, "b *s c"]:
    """Gives a per-case vector singleton spatial axes so that it broadcasts over an array of rank `ndim`."""
    return v.reshape(v.shape[0], *(1,) * (ndim - 2), v.shape[-1])


def depth_taps(x: Float[Array, "b d h w i"], kernel: Float[Array, "3 k l i o"], *rest: Any, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated` of a same-padded 3-D convolution, as a sum over depth taps of 2-D ones.

    XLA's 3-D convolutions on CPU are slow. Float32, kernel 3 x 3 x 3, two busy cores, seconds of the value and of value
    and gradient: for 2 x 32 x 64 x 64 x 16 .24 and .89 by lax in 3-D, .06 and .26 so, .11 and .34 as one convolution of
    the depth taps side by side in the input channels, .13 and .58 with them in the output channels (which takes twice
    the memory); for 2 x 16 x 32 x 32 x 32 .061 and .243, .026 and .119, .027 and .118, .028 and .124.
    """
    del rest, options  # strides, padding and layouts: `Conv` has no others
    b, depth, *plane, i = x.shape
    x = jnp.pad(x, [(0, 0), (1, 1), *((0, 0),) * 3])
    taps = [x[:, t : t + depth].reshape(b * depth, *plane, i) for t in range(3)]
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = sum(convolve(tap, kernel[t]) for t, tap in enumerate(taps))
    return jnp.reshape(y, (b, depth, *plane, kernel.shape[-1]))


class Conv(nn.Module):
    """Same-padded convolution with a cubic kernel over all the spatial axes, in the type of its input or in `dtype`.

    `size` is 1 or 3. In 3-D a CPU gets `depth_taps`, all else a convolution in 3-D, of the same parameters. Which is
    decided when the program is traced, as for the members of an ensemble: `jax.lax.platform_dependent` would decide it
    when the program is lowered, but trace, differentiate and keep the residuals of both.
    """

    features: int
    size: int = 3
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *s d"]:
        options: dict[str, Any] = {
            "use_bias": self.use_bias,
            "dtype": x.dtype if self.dtype is None else self.dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        if self.size == 1:  # a matrix product: faster than a 1x1 convolution on CPU
            return nn.Dense(self.features, **options)(x)
        kernel = (self.size,) * (x.ndim - 2)
        by_taps = len(kernel) == 3 and jax.default_backend() == "cpu"
        return nn.Conv(self.features, kernel, conv_general_dilated=depth_taps if by_taps else None, **options)(x)


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
        shift = self.param("shift", nn.initializers.zeros_init(), (c,)).astype(h.dtype)
        shift = jnp.broadcast_to(shift[None], gain.shape)
        if embedding is not None:
            film = nn.Dense(2 * c, dtype=h.dtype, kernel_init=nn.initializers.normal(0.01), name="film")(embedding)
            gain, shift = gain + film[:, :c], shift + film[:, c:]
        gain = per_voxel(gain, h.ndim)
        if spatial is not None:
            gain = gain + spatial
        g = g * gain + per_voxel(shift, h.ndim)
        small = nn.initializers.variance_scaling(0.5, "fan_in", "normal")
        return (h + Conv(c, kernel_init=small)(nn.silu(g) * body)) * body


def block(remat: bool) -> type[Block]:
    """`Block`, or with `remat` one that keeps its inputs alone and computes the rest again for the gradient."""
    return nn.remat(Block) if remat else Block


def background_bias(classes: int, copies: int = 1, value: float = 3.0) -> nn.initializers.Initializer:
    """Initial logits that favour background, the commonest class, so that the first steps do not learn only that.

    `copies` voxels share one bias vector (space-to-depth puts the classes of a block's voxels side by side).
    """

    def init(key, shape: Sequence[int], dtype=jnp.float32):
        del key
        one = jnp.zeros((classes,), dtype).at[0].set(value)
        return jnp.tile(one, copies).reshape(tuple(shape))

    return init
