"""The stages in which a method's network is trained: what each minimises, at which rates, and one step of it."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from entrust_jax import model as entrust
from entrust_jax import networks
from entrust_jax.baselines import unet
from entrust_jax.runtime import mesh
from entrust_jax.runtime.state import TrainState, create, ema_decay, update_ema

Batch = dict[str, Array]
Loss = Callable[..., tuple[Array, dict[str, Array]]]
SLOW = 0.1  # learning rate of EnFuse relative to SegDiff in stage 2a


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage. `begin` and `steps` count global optimiser steps; `rates` maps a parameter group to its

    learning-rate factor (0 = frozen).
    """

    name: str
    begin: int
    steps: int
    loss: Loss
    rates: dict[str, float]
    learning_rate: float


def plan_stages(config: Any, network: Any) -> list[Stage]:
    """The stages of the config's method."""
    t, d = config.train, config.diffusion
    if config.method != "entrust":
        loss = functools.partial(_unet_loss, network, dice=config.unet.dice)
        return [Stage("unet", 0, t.unet_steps, loss, {"all": 1.0}, t.learning_rate)]
    first = Stage(
        "enfuse", 0, t.enfuse_steps, functools.partial(_enfuse_loss, network, steps=t.enfuse_steps),
        {"enfuse": 1.0, "prior": 1.0, "segdiff": 0.0}, t.learning_rate,
    )  # fmt: skip
    segdiff = functools.partial(_segdiff_loss, network, low=d.lambda_min, high=d.lambda_max, draws=t.draws)
    second = Stage(
        "segdiff", t.enfuse_steps, t.segdiff_steps, segdiff,
        {"enfuse": SLOW, "prior": 0.0, "segdiff": 1.0}, t.learning_rate,
    )  # fmt: skip
    return [first, second]


def _enfuse_loss(network: Any, params: Any, batch: Batch, key: Array, step: Array, *, steps: int, **options: Any):
    return entrust.enfuse_loss(network, params, batch, key, step / max(steps, 1), **options)


def _segdiff_loss(network: Any, params: Any, batch: Batch, key: Array, step: Array, **options: Any):
    del step
    return entrust.segdiff_loss(network, params, batch, key, **options)


def _unet_loss(network: Any, params: Any, batch: Batch, key: Array, step: Array, *, dice: float):
    del step
    return unet.loss(network, params, batch, key, dice=dice)


def parameter_group(path: tuple[Any, ...]) -> str:
    """Which of a stage's `rates` a parameter of EnTrust follows."""
    names = [entry.key for entry in path]
    if "prior" in names:
        return "prior"
    return "segdiff" if {"denoiser", "projection"} & set(names) else "enfuse"


def optimiser(config: Any, stage: Stage) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay, gradients clipped to norm 1, each group at its rate."""
    warmup = min(100, max(1, stage.steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.learning_rate, warmup, max(stage.steps, warmup + 1), 0.02 * stage.learning_rate
    )
    groups: dict[Hashable, optax.GradientTransformation] = {
        name: optax.scale(rate) if rate else optax.set_to_zero() for name, rate in stage.rates.items()
    }
    label = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: parameter_group(path))
    if set(groups) == {"all"}:
        label = functools.partial(jax.tree.map, lambda _: "all")
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=config.train.weight_decay),
        optax.partition(groups, label),
    )


def members(config: Any) -> int:
    """Networks trained at once."""
    return 1 if config.method == "entrust" else unet.members(config)


def initial_state(config: Any, tx: optax.GradientTransformation) -> TrainState:
    """Random parameters and optimiser state; call inside jit."""
    params = networks.init_params(config, jax.random.key(config.seed))
    return create(params, tx) if config.method == "entrust" else jax.vmap(lambda p: create(p, tx))(params)


def start_from(config: Any, stage: Stage, params: Any, devices: Any) -> TrainState:
    """A fresh optimiser and average on given parameters."""
    tx = optimiser(config, stage)
    make = create if config.method == "entrust" else jax.vmap(create, in_axes=(0, None))
    return jax.jit(lambda p: make(p, tx), out_shardings=mesh.replicated(devices))(params)


def step_key(config: Any, stage: Stage) -> Array:
    """The key that a stage folds its step into; one per member for U-Nets."""
    key = jax.random.fold_in(jax.random.key(config.seed), stage.begin + 1)
    return key if config.method == "entrust" else jax.random.split(key, members(config))


def train_step(
    state: TrainState, batch: Batch, key: Array, *, loss: Loss, tx: optax.GradientTransformation, decay: float
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step of one network: pure. A loss or gradient that is not finite changes nothing but `step`."""
    key = jax.random.fold_in(key, state.step)
    (value, figures), gradient = jax.value_and_grad(loss, has_aux=True, argnums=0)(state.params, batch, key, state.step)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, ema_decay(state.step, decay))
    new = (params, ema, opt_state)
    params, ema, opt_state = jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), new, (state.params, state.ema, state.opt_state)
    )
    figures = figures | {"gradient_norm": norm, "finite": finite}
    return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), figures
