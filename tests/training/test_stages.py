"""A step changes nothing where it is not finite, and each stage moves its own parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import phantom
from entrust_jax import networks
from entrust_jax.runtime import state
from entrust_jax.training import stages


def quadratic(params, batch, key, step):
    del key, step
    value = jnp.sum(jnp.square(params["w"] - batch["x"]))
    return value, {"loss": value}


def kink(params, batch, key, step):
    """Finite where its gradient is not: the square root at 0."""
    del key, step
    value = jnp.sqrt(jnp.sum(params["w"] * batch["x"]))
    return value, {"loss": value}


@pytest.mark.parametrize(
    ("loss", "x", "finite"), [(quadratic, 2.0, True), (quadratic, np.inf, False), (kink, 0.0, False)]
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(loss, x, finite):
    tx = optax.adamw(0.1)
    old = state.create({"w": jnp.arange(1.0, 4.0)}, tx)
    old = old.replace(ema=jax.tree.map(lambda leaf: leaf + 1, old.params))  # so that an update would show
    batch = {"x": jnp.full(3, x)}
    new, figures = jax.jit(functools.partial(stages.train_step, loss=loss, tx=tx, decay=0.9))(
        old, batch, jax.random.key(0)
    )
    assert bool(figures["finite"]) == finite and int(new.step) == 1
    changed = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)]
    assert sum(changed) == (6 if finite else 1)  # step; then params, ema, and count, mu and nu of Adam
    if finite:  # EMA with the ramp of its decay, (1 + 0) / (10 + 0) at step 0
        np.testing.assert_allclose(new.ema["w"], old.ema["w"] + 0.9 * (new.params["w"] - old.ema["w"]), rtol=1e-6)


def entrust_config():
    values = phantom.get_config()
    values.data.patch = (16, 16)
    values.model.update(widths=(4, 8), d_c=4, d_u=4)
    return values


def test_each_stage_moves_its_own_parameters():
    config = entrust_config()
    planned = stages.plan_stages(config, networks.network_of(config))
    assert [(stage.name, stage.begin) for stage in planned] == [("enfuse", 0), ("segdiff", config.train.enfuse_steps)]
    shapes = jax.eval_shape(lambda: networks.init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)

    def sizes(stage):
        """The largest update of each group in the second step (the first has rate 0) on a gradient of ones."""
        tx = stages.optimiser(config, stage)

        @jax.jit
        def second_update(params):
            _, opt_state = tx.update(params, tx.init(params), params)
            return tx.update(params, opt_state, params)[0]

        updates = second_update(params)
        found = {"enfuse": [], "prior": [], "segdiff": []}
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            found[stages.parameter_group(path)].append(np.abs(leaf).max())
        return {name: max(values) for name, values in found.items()}

    first, second = map(sizes, planned)
    assert first["segdiff"] == 0 and first["enfuse"] == first["prior"] > 0
    assert second["prior"] == 0 and second["segdiff"] > 0
    assert second["enfuse"] == pytest.approx(stages.SLOW * second["segdiff"], rel=1e-5)
