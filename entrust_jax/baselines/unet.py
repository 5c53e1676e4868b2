"""The plain U-Net that a user would pick instead, or several of them: a deep ensemble (Lakshminarayanan et al. 2017).

Modalities are concatenated with their availability. Members are stacked along a leading axis of the parameters and run
at once (`over_members`); a single U-Net is an ensemble of one. With dropout, in training and at inference, passes take
the place of members: Monte Carlo dropout (Gal & Ghahramani 2016, arXiv 1506.02142).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from entrust_jax.enfuse.objective import modality_dropout
from entrust_jax.layers import (
    Conv,
    Strides,
    apply,
    background_bias,
    block,
    body_at_scales,
    depth_to_space,
    per_voxel,
    pool,
    rms_norm,
    space_to_depth,
    upsample_linear,
)
from entrust_jax.model import compute_of, strides_of
from entrust_jax.scores import case_mean, cross_entropy, over_cases

_DROPOUT = 2  # folded into a step's key: the first that `modality_dropout` does not split off


def dropped(
    h: Float[Array, "b *s c"], noise: Key[Array, " b"] | None, place: int, rate: float
) -> Float[Array, "b *s c"]:
    """The features W diag(z) sees, z_c ~ Bernoulli(1 - rate) / (1 - rate), as they are without `noise`.

    One z a case and channel: in Gal & Ghahramani a pass is one draw of the weights, the same wherever they are applied.
    So all slices and windows of a scan, whose cases have the same key, are seen by one network.
    """
    if noise is None:
        return h
    keep = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, place), 1 - rate, h.shape[-1:]))(noise)
    return h * per_voxel((keep / (1 - rate)).astype(h.dtype), h.ndim)


class UNet(nn.Module):
    """Logits of the classes from all modalities at once. Widths, blocks and norm are those of the denoiser.

    dropout: share of the channels that `noise`, a key for each case, leaves out before every convolution between scales
    and before the last. passes: how many such draws stand for the network at inference, where dropout is above 0.
    """

    classes: int
    widths: tuple[int, ...]
    strides: Strides
    compute: str = "float32"
    remat: bool = False
    dropout: float = 0.0
    passes: int = 1

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b m *s"],
        present: Bool[Array, "b m"],
        body: Bool[Array, "b *s"],
        noise: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b *s k"]:
        b, m, *space = image.shape
        mu = present.astype(jnp.float32).reshape(b, m, *(1,) * len(space)) * body[:, None]
        inside = body_at_scales(body.astype(self.compute), self.strides)
        # A missing modality is zero and says so: zero alone is also the mean intensity.
        x = jnp.concatenate([image * mu, mu], axis=1)
        h = space_to_depth(jnp.moveaxis(x, 1, -1).astype(self.compute), self.strides[0])
        Block = block(self.remat)
        skips = []
        for s, width in enumerate(self.widths):
            h = Conv(width, name=f"enter_{s}")(pool(h, self.strides[s]) if s else h) * inside[s]
            h = Block(name=f"down_{s}_0")(h, inside[s])
            h = dropped(Block(name=f"down_{s}_1")(h, inside[s]), noise, s, self.dropout)
            skips.append(h)
        for s in reversed(range(len(self.widths) - 1)):
            h = upsample_linear(Conv(self.widths[s], 1, use_bias=False, name=f"up_{s}")(h), self.strides[s + 1])
            h = (h + Conv(self.widths[s], 1, name=f"lateral_{s}")(skips[s])) * inside[s]
            h = dropped(Block(name=f"top_{s}")(h, inside[s]), noise, len(self.widths) + s, self.dropout)
        copies = math.prod(self.strides[0])
        last = Conv(
            self.classes * copies,
            kernel_init=nn.initializers.zeros_init(),
            bias_init=background_bias(self.classes, copies),
            dtype=jnp.float32,
            name="logits",
        )(nn.silu(rms_norm(h)))  # without the norm some runs fall into a constant prediction and stay there
        return depth_to_space(last, self.strides[0])


def build(config) -> UNet:
    """The U-Net of a config (`config.unet`, classes of `config.data`; strides, compute and remat of `config.model`)."""
    return UNet(
        len(config.data.classes),
        tuple(config.unet.widths),
        strides_of(config),
        compute_of(config),
        config.model.remat,
        config.unet.dropout,
        config.unet.passes,
    )


def members(config) -> int:
    """How many U-Nets the config's method trains."""
    return config.unet.members if config.method == "deep_ensemble" else 1


def over_members(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` over the leading axis of all its arguments, the members of an ensemble.

    That is `vmap`. But on CPU a convolution with kernels of its own for every member is several times slower than the
    members' convolutions one after the other: there the loop over members is unrolled into the same program.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function)

    def unrolled(*arguments: Any) -> Any:
        count = jax.tree.leaves(arguments)[0].shape[0]
        each = [function(*jax.tree.map(lambda x, i=i: x[i], arguments)) for i in range(count)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    return unrolled


def soft_dice(logits: Float[Array, "b *s k"], label: Array, inside: Float[Array, "b *s"]) -> Float[Array, " b"]:
    """1 - mean foreground-class soft Dice of each case (Milletari et al. 2016), over the labelled body."""
    p = jax.nn.softmax(logits, axis=-1) * inside[..., None]
    y = jax.nn.one_hot(label, logits.shape[-1]) * inside[..., None]
    axes = tuple(range(1, p.ndim - 1))
    overlap, size = jnp.sum(p * y, axis=axes), jnp.sum(p + y, axis=axes)
    return 1 - jnp.mean(((2 * overlap + 1) / (size + 1))[:, 1:], axis=-1)


def loss(
    model: UNet, params: Any, batch: dict[str, Array], key: Array, *, dice: float
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy inside the body plus `dice` times soft Dice (nnU-Net's habit at 1, a proper score at 0)."""
    present = modality_dropout(key, batch["present"])
    noise = jax.random.split(jax.random.fold_in(key, _DROPOUT), len(present)) if model.dropout else None
    logits = apply(model, params, batch["image"], present, batch["body"], noise)
    inside = (batch["body"] & (batch["label"] >= 0)).astype(jnp.float32)
    some = jnp.sum(inside, axis=tuple(range(1, inside.ndim))) > 0
    weight = batch["weight"] * batch["valid"] * some
    ce = over_cases(case_mean(cross_entropy(logits, batch["label"]), inside), weight)
    value = ce
    if dice:
        value = value + dice * over_cases(soft_dice(logits, batch["label"], inside), weight)
    return value, {"loss": value, "ce": ce}


def validate(model: UNet, params: Any, batch: dict[str, Array]) -> Float[Array, " b"]:
    """Cross-entropy of each case inside the body with all its modalities."""
    logits = apply(model, params, batch["image"], batch["present"], batch["body"])
    inside = (batch["body"] & (batch["label"] >= 0)).astype(jnp.float32)
    return case_mean(cross_entropy(logits, batch["label"]), inside)
