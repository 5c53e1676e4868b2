"""The state of training: a pytree of arrays, made inside the jitted init so that no buffer is shared."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class TrainState:
    """All that changes while training.

    Random numbers are folded from (seed, step), so no key is part of the state.

    Attributes:
      step: i32 [], optimiser steps taken.
      params: the parameters that are trained.
      ema: exponential moving average of params, same tree, what evaluation uses.
      opt_state: optax's state.
    """

    # Any: the same tree also carries shapes (jax.eval_shape) and shardings in place of arrays.
    step: Any
    params: Any
    ema: Any
    opt_state: Any


def create(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state at step 0. Call it inside jit: outside it would share buffers between params and ema."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Donating a state whose params and ema are one buffer fails; the barrier keeps them two.
        ema=jax.lax.optimization_barrier(jax.tree.map(jnp.copy, params)),
        opt_state=tx.init(params),
    )


def ema_decay(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Decay for the update at `step` (0-based): min(decay, (1 + step) / (10 + step)).

    The ramp keeps the random initial values from weighing on the average of a short training.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update_ema(ema: Any, params: Any, decay: float | Float[Array, ""]) -> Any:
    """ema <- decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)
