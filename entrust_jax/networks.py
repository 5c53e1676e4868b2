"""The network of a config's method: what it is, shapes of its batches and parameters, how a scan goes through it."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from entrust_jax import inference, model, windows
from entrust_jax.baselines import unet
from entrust_jax.data.preprocess import Volume
from entrust_jax.trustmap.prediction import Raw


def network_of(config: Any) -> model.EnTrust | unet.UNet:
    """The network that a config's method trains."""
    return model.build(config) if config.method == "entrust" else unet.build(config)


def example_batch(config: Any, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a training batch of `size` patches."""
    space = tuple(config.data.patch)
    m = len(config.data.modalities)
    shapes = {
        "image": ((size, m, *space), "float32"),
        "present": ((size, m), "bool"),
        "label": ((size, *space), "int32"),
        "body": ((size, *space), "bool"),
        "coordinates": ((size, *space, 3), "float32"),
        "weight": ((size,), "float32"),
        "valid": ((size,), "bool"),
        "case": ((size,), "int32"),
        "slice": ((size,), "int32"),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def init_params(config: Any, key: jax.Array) -> Any:
    """Random parameters of the config's network; stacked by member for a U-Net. Call inside jit or eval_shape."""
    network = network_of(config)
    batch = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), example_batch(config, 1))
    if isinstance(network, unet.UNet):
        keys = jax.random.split(key, unet.members(config))
        return jax.vmap(lambda k: network.init(k, batch["image"], batch["present"], batch["body"]))(keys)
    return network.init({"params": key, "dropout": key}, batch, key)


def coarsest(config: Any) -> tuple[int, ...]:
    """Voxels along each side of one voxel of the network's coarsest scale: sizes must be multiples of them."""
    return tuple(math.prod(factors) for factors in zip(*model.strides_of(config), strict=True))


def multiple(config: Any) -> int:
    """In-plane sizes are padded to a multiple of this: what pooling needs, and few enough shapes to compile for."""
    return math.lcm(16, *coarsest(config))


def volumetric(config: Any) -> bool:
    """Whether the network sees volumes, by its training patch; else axial slices."""
    return len(config.data.patch) == 3


def extent(config: Any) -> dict[str, Any]:
    """How a whole scan goes through the network: windows, or slices padded to a multiple."""
    if volumetric(config):
        return {"window": tuple(config.data.window or config.data.patch), "unit": coarsest(config)}
    return {"multiple": multiple(config)}


def examine_with(
    config: Any,
    network: Any,
    params: Any,
    devices: Mesh,
    tau: float,
    volume: Volume,
    slices: int | None = None,
    probed: bool = True,
) -> Raw:
    """`api.examine` for parameters that are not in a working folder yet (the trainer's calibration stage)."""
    rooms = windows if volumetric(config) else inference
    shared = {"model": network, "mesh": devices, "slices": slices} | extent(config)
    key = jax.random.key(config.seed)
    if isinstance(network, unet.UNet):
        return rooms.examine_unet(params, volume, key, tau=tau, **shared)
    return rooms.examine(
        params,
        volume,
        key,
        sampler=inference.sampler_of(config),
        hypotheses=config.diffusion.hypotheses,
        probed=probed,
        **shared,
    )


def one_step_with(config: Any, network: Any, params: Any, devices: Mesh, volume: Volume) -> np.ndarray:
    """Probabilities [d h w k] of a case without hypotheses: EnTrust's one-step prediction, the U-Nets' mean."""
    if isinstance(network, unet.UNet):
        return examine_with(config, network, params, devices, 0.5, volume)["mean"]
    rooms = windows if volumetric(config) else inference
    return rooms.one_step(
        params, volume, jax.random.key(config.seed),
        model=network, sampler=inference.sampler_of(config), mesh=devices, **extent(config),
    )  # fmt: skip
