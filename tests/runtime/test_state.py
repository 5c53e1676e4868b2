"""The training state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from entrust_jax.runtime import state as states
from entrust_jax.runtime.mesh import data_mesh, replicated

TX = optax.adamw(1e-2)


@functools.partial(jax.jit, donate_argnums=0)
def step(state):
    updates, opt_state = TX.update(jax.tree.map(jnp.ones_like, state.params), state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = states.update_ema(state.ema, params, 0.9)
    return state.replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)


def test_params_and_ema_are_separate_buffers_that_can_be_donated():
    init = jax.jit(
        lambda key: states.create({"w": jax.random.normal(key, (4, 3))}, TX),
        out_shardings=replicated(data_mesh()),
    )
    state = init(jax.random.key(0))
    start = np.array(state.params["w"])
    np.testing.assert_array_equal(state.ema["w"], start)
    pointers = [
        {shard.data.unsafe_buffer_pointer() for shard in tree["w"].addressable_shards}
        for tree in (state.params, state.ema)
    ]
    assert not pointers[0] & pointers[1]
    state = step(state)
    assert int(state.step) == 1
    np.testing.assert_allclose(state.ema["w"], 0.9 * start + 0.1 * np.array(state.params["w"]), rtol=1e-5)
    assert np.all(np.array(state.params["w"]) != start)


def test_ema_decay_rises_to_its_limit():
    decay = [float(states.ema_decay(jnp.asarray(t, jnp.int32), 0.995)) for t in (0, 90, 10**6)]
    np.testing.assert_allclose(decay, [0.1, 0.91, 0.995], rtol=1e-6)
