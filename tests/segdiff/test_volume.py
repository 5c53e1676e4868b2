"""Windows over a scan: they cover it, they speak with one voice at every step, and their batching changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrust_jax.segdiff import sampler as sampling
from entrust_jax.segdiff import volume
from entrust_jax.segdiff.sampler import Sampler

B = 0.2
DDIM = Sampler(b=B, lambda_min=-12.0, lambda_max=8.5, steps=16)
KEY = jax.random.key(0)
WINDOW, UNIT = (4, 8, 8), (1, 2, 2)

axes = st.tuples(*[st.integers(1, 40)] * 3)


@given(axes, st.tuples(*[st.integers(1, 6)] * 3), st.tuples(*[st.sampled_from((1, 2, 4))] * 3))
@settings(deadline=None, max_examples=60)
def test_windows_cover_what_is_wanted_and_keep_the_pooling_lattice(size, units, unit):
    window = tuple(n * u for n, u in zip(units, unit, strict=True))
    lattice = volume.lattice_size(size, window, unit)
    assert all(have >= need for have, need in zip(lattice, size, strict=True))
    rng = np.random.default_rng(sum(size))
    wanted = np.zeros(lattice, bool)
    wanted[tuple(rng.integers(0, n, 3) for n in size)] = True
    at = volume.origins(wanted, window, unit)
    covered = np.zeros(lattice, bool)
    for origin in at:
        box = tuple(slice(a, a + w) for a, w in zip(origin, window, strict=True))
        assert wanted[box].any()  # no window in vain
        covered[box] = True
    assert covered[wanted].all()
    assert np.all(at % np.array(unit) == 0)
    assert np.all(at + np.array(window) <= np.array(lattice))


def test_gaussian_weights_by_hand():
    weight = volume.gaussian((1, 5, 8))
    assert weight.shape == (1, 5, 8)
    np.testing.assert_allclose(weight[0, 2, 4] / weight[0, 2, 5], np.exp(-0.5 * (0.5**2 - 1.5**2)), rtol=1e-6)
    np.testing.assert_allclose(weight, weight[:, ::-1, ::-1])
    assert weight.min() >= volume.LEAST_WEIGHT


def lattice_of(size):
    lattice = volume.lattice_size(size, WINDOW, UNIT)
    at = volume.origins(np.ones(lattice, bool), WINDOW, UNIT)
    return lattice, at


def scan_denoiser(denoise, lattice, at, together=1, first=None):
    room = -(-len(at) // together) * together
    filled = np.concatenate([at, np.repeat(at[-1:], room - len(at), axis=0)])
    first = jnp.full((1, *lattice, 2), 0.5) if first is None else first
    return volume.joined(denoise, first, jnp.asarray(filled), jnp.asarray(len(at)), WINDOW, together)


def test_a_voxelwise_denoiser_is_the_same_through_windows():
    """Where windows agree, joining them changes nothing; where none lies, `first` is said."""
    lattice, at = lattice_of((7, 14, 11))

    def denoise(x, log_snr, condition):
        return 3 * x + condition[:, None] + log_snr.reshape(-1, 1, 1, 1, 1)

    x = jax.random.normal(KEY, (1, *lattice, 2))
    conditions = jnp.zeros((len(at) + 1, 1, 1, 1))
    whole = jax.nn.log_softmax(denoise(x, jnp.ones(1), jnp.zeros((1, 1, 1, 1))))
    found = scan_denoiser(denoise, lattice, at)(x, jnp.ones(1), conditions)
    np.testing.assert_allclose(found, whole, atol=1e-5)

    first = jnp.broadcast_to(jnp.array([0.25, 0.75]), (1, *lattice, 2))
    found = scan_denoiser(denoise, lattice, at[:1], first=first)(x, jnp.ones(1), conditions)
    inside = tuple(slice(a, a + w) for a, w in zip(at[0], WINDOW, strict=True))
    np.testing.assert_allclose(found[0][inside], whole[0][inside], atol=1e-5)
    outside = np.ones(lattice, bool)
    outside[inside] = False
    np.testing.assert_allclose(np.exp(found[0])[outside], np.broadcast_to([0.25, 0.75], (outside.sum(), 2)), atol=1e-5)


def all_or_nothing(x, log_snr, condition):
    """The exact denoiser of a law with two masks, all foreground (share .7) or none, as one window can see it."""
    del condition
    alpha, variance = jax.nn.sigmoid(log_snr) ** 0.5, jax.nn.sigmoid(-log_snr)
    full = jnp.array([-B, B]).reshape(1, 1, 1, 1, 2)

    def fit(mean):
        square = jnp.sum(jnp.square(x - alpha.reshape(-1, 1, 1, 1, 1) * mean), axis=(1, 2, 3, 4))
        return -0.5 * square / variance

    odds = np.log(0.7 / 0.3) + fit(full) - fit(-full)
    return 0.5 * odds.reshape(-1, 1, 1, 1, 1) * jnp.broadcast_to(full / B, x.shape)


def draw(numbers, denoise, lattice, at):
    one = functools.partial(
        sampling.hypothesis, denoise, jnp.zeros((len(at) + 8,)), jnp.zeros((1, *lattice)), jnp.array([5]), KEY,
        sampler=DDIM, classes=2,
    )  # fmt: skip
    return np.asarray(jax.jit(lambda n: jax.lax.map(lambda i: one(i)[0], n))(numbers))


@pytest.mark.parametrize(("step", "most"), [(volume.STEP, 0.5), (0.75, 0.9)])
def test_an_object_in_two_windows_is_resolved_twice_less_often(step, most, monkeypatch):
    """Each window sees a part of an object that is there as a whole or not at all. No window alone knows the law, so

    some walls stay: in 12 % of the hypotheses where windows are half a window apart, in about 30 % at three quarters;
    windows sampled each by itself differ in 42 %. An object that fits into a window has none of this.
    """
    monkeypatch.setattr(volume, "STEP", step)
    lattice, at = lattice_of((4, 8, 12))
    assert len(at) == 2
    masks = np.argmax(draw(jnp.arange(400), scan_denoiser(all_or_nothing, lattice, at), lattice, at), -1)
    share = masks.mean(axis=(1, 2, 3))
    wall = np.mean((share > 0.02) & (share < 0.98))
    assert abs(share.mean() - 0.7) < 3 * np.sqrt(0.21 / 400) + 0.02

    alone = [
        np.argmax(draw(jnp.arange(400) + 1000 * i, scan_denoiser(all_or_nothing, WINDOW, at[:1] * 0), WINDOW, at), -1)
        for i in range(2)
    ]
    apart = np.mean(alone[0][:, 0, 0, 0] != alone[1][:, 0, 0, 0])
    assert apart > 0.35 and wall < most * apart


def test_no_batching_of_windows_changes_a_hypothesis():
    lattice, at = lattice_of((7, 14, 11))

    def denoise(x, log_snr, condition):
        blurred = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 3, 1), (1,) * 5, "SAME")
        return blurred * log_snr.reshape(-1, 1, 1, 1, 1) / 4 + condition.reshape(-1, 1, 1, 1, 1)

    found = [draw(jnp.arange(2), scan_denoiser(denoise, lattice, at, n), lattice, at) for n in (1, 3, 4)]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    assert np.mean(np.abs(found[0][0] - found[0][1])) > 0.01
