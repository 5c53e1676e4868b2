"""The features of each modality of a case, by which `trustmap.ood` knows whether its scan looks like training's.

The encoder alone runs, on the same slices or windows as a prediction; what a scan shows without a network is added.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from entrust_jax.data import survey
from entrust_jax.data.preprocess import Volume
from entrust_jax.inference import condition_of
from entrust_jax.layers import apply
from entrust_jax.model import EnTrust
from entrust_jax.runtime.mesh import AXIS
from entrust_jax.trustmap import ood, statistics

_DATA, _WHOLE = PartitionSpec(AXIS), PartitionSpec()


def describe(
    params: Any, volume: Volume, batches: Iterable[dict[str, np.ndarray]], *, model: EnTrust, mesh: Mesh
) -> dict[str, np.ndarray]:
    """The features of each modality of a case by which `ood` knows whether it looks like training's: group -> [m f].

    encoder: means over the body of c_m and u_m at every scale, the logarithm of the error with which its image is
    redrawn, the entropy of p_m, and the logarithm of the conflict with the modality that contradicts it most. texture:
    `ood.texture`. look: `ood.spread`, the mean and deviation in the cells of the body's box (`survey.appearance`), and
    the texture. NaN where a modality is missing. The encoder alone runs: seconds a scan, without hypotheses.

    batches: the case's slices, or the windows of a network on volumes, whose overlaps count as often as they are seen.
    """
    parts = [
        jax.tree.map(lambda x, piece=piece: np.asarray(x)[piece["valid"]].astype(np.float64).sum(axis=0), sums)
        for piece in batches
        for sums in [encoded_sums(params, piece, model=model, mesh=mesh)]
    ]
    sums = jax.tree.map(lambda *x: sum(x), *parts)
    first, second = np.triu_indices(len(volume.present), 1)
    both = volume.present[first] & volume.present[second]
    found: dict[str, list[np.ndarray]] = {"encoder": [], "texture": [], "look": []}
    with np.errstate(divide="ignore", invalid="ignore"):
        error, entropy = (sums["other"] / [sums["redrawn"], sums["inside"]]).T
        kappa = sums["pairs"] / sums["inside"]
        means = sums["features"] / sums["sizes"]
    for m in range(len(volume.present)):
        mine = kappa[both & ((first == m) | (second == m))]
        contested = np.log(mine.max() + 1e-3) if mine.size else np.nan
        texture = ood.texture(volume.image[m], volume.body)
        cells = survey.appearance(volume, volume.image[m], volume.body)
        look = (ood.spread(volume.image[m], volume.body), cells, texture)
        found["encoder"].append(np.append(means[m], [np.log(error[m] + 1e-3), entropy[m], contested]))
        found["texture"].append(texture)
        found["look"].append(np.concatenate(look))
    return {
        name: np.where(volume.present[:, None] & np.isfinite(rows), np.stack(rows), np.nan)
        for name, rows in found.items()
    }


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def encoded_sums(params: Any, batch: dict[str, Array], *, model: EnTrust, mesh: Mesh) -> dict[str, Array]:
    """What the encoder says of a chunk, summed over the space of each of its elements; nothing is drawn.

    features: c_m and u_m of all scales, side by side, each sum over the voxels of its scale's body; sizes: the voxels
    of the body at the scale of each feature. other [b m 2]: error of the image redrawn from F_c and u_m, and entropy of
    p_m; pairs [b p]: kappa_mn; of these `redrawn` and `inside` are the numbers of voxels.
    """

    def total(x: Array, weight: Array) -> Array:  # [b a *t] or [b a *t d] -> [b a] or [b a d]
        weight = weight.reshape(weight.shape[0], 1, *weight.shape[1:], *(1,) * (x.ndim - weight.ndim - 1))
        return jnp.sum(x.astype(jnp.float32) * weight, axis=tuple(range(2, 2 + batch["body"].ndim - 1)))

    def local(params, batch):
        evidence = apply(model, params, batch["image"], batch["coordinates"], batch["body"], method="encode")
        fused = condition_of(model, params, evidence, batch["present"]).fused
        body = batch["body"].astype(jnp.float32)
        space, sums, sizes = body.shape[1:], [], []
        for c, u in zip(evidence.c, evidence.u, strict=True):
            inside = (_block_means(body, c.shape[2:-1]) > 0.5).astype(jnp.float32)
            sums.append(total(jnp.concatenate([c, u], axis=-1), inside))
            size = jnp.sum(inside, axis=tuple(range(1, inside.ndim)))
            sizes.append(jnp.broadcast_to(size[:, None], (len(size), sums[-1].shape[-1])))
        at = evidence.u[1].shape[2:-1]
        shared = jnp.broadcast_to(fused.F_c[1][:, None], evidence.c[1].shape)
        _, image = apply(
            model, params, fused, shared, fused.F_u[1], method=lambda module, *parts: module.auxiliary(*parts)
        )
        inside = (_block_means(body, at) > 0.5).astype(jnp.float32)
        rows = batch["image"].reshape(-1, *space)
        error = jnp.abs(image - _block_means(rows, at).reshape(image.shape))
        entropy = statistics.entropy(jax.nn.softmax(evidence.logits.astype(jnp.float32), axis=-1))
        return {
            "features": jnp.concatenate(sums, axis=-1),
            "sizes": jnp.concatenate(sizes, axis=-1),
            "other": jnp.stack([total(error, inside), total(entropy, body)], axis=-1),
            "pairs": total(fused.kappa_pairs, body),
            "redrawn": jnp.sum(inside, axis=tuple(range(1, inside.ndim))),
            "inside": jnp.sum(body, axis=tuple(range(1, body.ndim))),
        }

    return jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, _DATA), out_specs=_DATA, check_vma=False)(params, batch)


def _block_means(x: Array, grid: tuple[int, ...]) -> Array:
    """Means over the blocks that become one voxel of a coarser grid; the first axis is left alone."""
    blocks = [n for size, cells in zip(x.shape[1:], grid, strict=True) for n in (cells, size // cells)]
    return jnp.mean(x.reshape(len(x), *blocks), axis=tuple(range(2, 2 + 2 * len(grid), 2)))
