"""A whole scan through windows: one noise field per hypothesis, the windows' estimates joined at every step.

A network that is trained on patches sees a scan through overlapping windows. Were each window sampled by itself, two of
them would resolve one lesion differently, and their average would be a half that no hypothesis ever said. So the state
x_t is that of the whole scan; at every step each window estimates the clean mask of its part, and

    p(u) = sum_w g_w(u) softmax(Den(x_t[w], lambda, condition_w))(u) / sum_w g_w(u),      g Gaussian

is the one estimate with which the whole scan steps on. Joining estimates at every step: MultiDiffusion (Bar-Tal et al.
2023, arXiv 2302.08113); Gaussian weights of deviation 1/8 of the window: nnU-Net (Isensee et al. 2021). Ours: what no
window covers is known beforehand, from the one-step prediction.

`joined` makes a denoiser of the scan out of one of windows, which `sampler.hypothesis` takes like any other: so noise,
steps and eta are those of the sampler, and the noise of a hypothesis depends on (key, case, number) and the size of the
lattice, not on windows or their batching.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from entrust_jax.segdiff.sampler import Denoise

DEVIATION = 1 / 8  # of the Gaussian weights, in windows
STEP = 0.5  # of a window, as in nnU-Net; .75 cost .06 of one-step Dice on two validation patients (sarcoma)
LEAST_WEIGHT = 1e-3  # at a window's corners: a corner of the lattice has one window alone


def steps_between(window: Sequence[int], unit: Sequence[int]) -> tuple[int, ...]:
    """Voxels from one window to the next: STEP of a window, rounded to whole voxels of the coarsest scale (`unit`).

    A pooling lattice that began elsewhere in every window would make them disagree without reason.
    """
    return tuple(max(u, int(STEP * w / u) * u) for w, u in zip(window, unit, strict=True))


def lattice_size(size: Sequence[int], window: Sequence[int], unit: Sequence[int]) -> tuple[int, ...]:
    """The least lattice of whole steps that holds `size` voxels: few sizes, so that few programs are compiled."""
    step = steps_between(window, unit)
    return tuple(w + max(0, -(-(n - w) // s)) * s for n, w, s in zip(size, window, step, strict=True))


def origins(
    wanted: Bool[np.ndarray, "d h w"], window: Sequence[int], unit: Sequence[int]
) -> Int[np.ndarray, "windows 3"]:
    """First voxel of every window of a lattice (`lattice_size`) that holds some wanted voxel, in C order."""
    step = steps_between(window, unit)
    starts = [range(0, n - w + 1, s) for n, w, s in zip(wanted.shape, window, step, strict=True)]
    every = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, wanted.ndim).astype(np.int32)
    touched = [wanted[tuple(slice(o, o + w) for o, w in zip(at, window, strict=True))].any() for at in every]
    return every[np.array(touched, bool)]


def gaussian(window: Sequence[int]) -> Float[np.ndarray, "*w"]:
    """Weights of a window's voxels, 1 in its middle, at least `LEAST_WEIGHT`."""
    value = np.ones((1,) * len(window))
    for axis, size in enumerate(window):
        at = (np.arange(size) - (size - 1) / 2) / (DEVIATION * size)
        value = value * np.exp(-0.5 * at**2).reshape([-1 if i == axis else 1 for i in range(len(window))])
    return np.maximum(value, LEAST_WEIGHT).astype(np.float32)


def joined(
    denoise: Denoise,
    first: Float[Array, "1 *s k"],
    at: Int[Array, "windows axes"],
    count: Int[Array, ""],
    window: tuple[int, ...],
    together: int = 1,
) -> Denoise:
    """The denoiser of a scan out of one of windows: denoise_scan(x_t [1, *s, k], log_snr [1], conditions) -> log p.

    denoise: of windows, with a condition each. conditions: a pytree whose leaves have a leading axis of windows.
    first: what is said where no window lies, probabilities. at: first voxels of the windows, of which `count` are real;
    the rest only fill up a shape. together: windows in one call of the network; `at` holds a multiple of it.
    """
    weight = jnp.asarray(gaussian(window))[..., None]
    classes = first.shape[-1]
    groups = -(-count // together)

    def window_of(x: Array, origin: Array) -> Array:
        return jax.lax.dynamic_slice(x, (*origin, 0), (*window, x.shape[-1]))

    def add(total: Array, value: Array, origin: Array) -> Array:
        return jax.lax.dynamic_update_slice(total, window_of(total, origin) + value, (*origin, 0))

    def each(origin_of: Callable, total: Array) -> Array:
        """Adds what `origin_of` says of each group of windows to a total of the scan; a filler adds nothing."""

        def group(i: Array, total: Array) -> Array:
            rows = i * together + jnp.arange(together)
            values, places = origin_of(rows), at[rows]
            for j in range(together):
                total = add(total, jnp.where(rows[j] < count, values[j], 0), places[j])
            return total

        return jax.lax.fori_loop(0, groups, group, total)

    space = first.shape[1:-1]
    seen = each(lambda rows: jnp.broadcast_to(weight[None], (together, *weight.shape)), jnp.zeros((*space, 1)))

    def scan_denoise(x_t: Array, log_snr: Array, conditions: Any) -> Array:
        def estimate(rows: Array) -> Array:
            x = jax.vmap(lambda origin: window_of(x_t[0], origin))(at[rows])
            some = jax.tree.map(lambda leaf: leaf[rows], conditions)
            return weight[None] * jax.nn.softmax(denoise(x, jnp.broadcast_to(log_snr, (together,)), some), axis=-1)

        total = each(estimate, jnp.zeros((*space, classes)))
        p = jnp.where(seen > 0, total / jnp.maximum(seen, LEAST_WEIGHT), first[0])
        return jnp.log(jnp.maximum(p, 1e-30))[None]

    return scan_denoise
