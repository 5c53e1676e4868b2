"""The latency suite: seconds for the hypotheses and TrustMap of one slice, beside one U-Net pass and as many as a deep

ensemble has, in one run on one machine. Weights are random: the time does not depend on them. Compilation is timed
apart.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from entrust_jax import inference, networks
from entrust_jax.baselines import unet
from entrust_jax.runtime import mesh


def seconds(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """First call (with compilation), then min, median and max of `repeats` calls, in seconds."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    rest = times[1:]
    return {"first": times[0], "min": min(rest), "median": float(np.median(rest)), "max": max(rest)}


def slice_batch(config: Any, size: int, copies: int) -> dict[str, np.ndarray]:
    """`copies` random slices with every modality: one, as often as the mesh has devices."""
    rng = np.random.default_rng(0)
    shapes = networks.example_batch(config, copies)
    batch: dict[str, Any] = {name: np.ones(s.shape, s.dtype) for name, s in shapes.items()}
    m = len(config.data.modalities)
    batch["image"] = rng.normal(size=(copies, m, size, size)).astype(np.float32)
    batch["label"] = rng.integers(0, 2, (copies, size, size)).astype(np.int32)
    batch["body"] = np.ones((copies, size, size), bool)
    batch["coordinates"] = rng.uniform(-1, 1, (copies, size, size, 3)).astype(np.float32)
    return batch


def measure(config: Any, size: int, repeats: int) -> dict[str, Any]:
    """Encode, hypotheses and probes of EnTrust against U-Net passes, on one device each: seconds by what was done.

    size: height and width of the slice, a multiple of what the networks pool by. repeats: timed calls after the first.
    """
    config = config.copy_and_resolve_references()
    one = mesh.data_mesh(jax.devices()[:1])
    key = jax.random.key(0)
    batch = slice_batch(config, size, 1)
    sampler, n = inference.sampler_of(config), config.diffusion.hypotheses

    network = networks.network_of(config)
    params = jax.jit(lambda: networks.init_params(config, key))()
    static = {"model": network, "sampler": sampler, "mesh": one}
    evidence, _ = inference.look(params, batch, key, **static)
    label = batch["label"]

    def entrust() -> Any:
        found, _ = inference.look(params, batch, key, **static)
        drawn = inference.draw(params, found, batch, key, hypotheses=n, **static)
        return drawn, inference.probe(params, found, batch, label, key, **static)

    result: dict[str, Any] = {
        "config": config.name,
        "slice": [size, size],
        "hypotheses": n,
        "steps": sampler.steps,
        "device": jax.devices()[0].device_kind,
        "encode_and_one_step": seconds(lambda: inference.look(params, batch, key, **static), repeats),
        "hypotheses_only": seconds(
            lambda: inference.draw(params, evidence, batch, key, hypotheses=n, **static), repeats
        ),
        "probes_only": seconds(lambda: inference.probe(params, evidence, batch, label, key, **static), repeats),
        "hypotheses_with_trustmap": seconds(entrust, repeats),
    }
    for method in ("unet", "deep_ensemble"):
        config.method = method
        net = networks.network_of(config)
        stacked = jax.jit(lambda: networks.init_params(config, key))()
        timed = seconds(lambda: inference.ensemble(stacked, batch, key, model=net, mesh=one), repeats)  # noqa: B023
        result[f"{method}_{unet.members(config)}"] = timed
    return result
