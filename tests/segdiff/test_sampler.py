"""The samplers against an exact denoiser: numbers, not only shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.benchmark.steps import discs, exact_denoiser
from entrust_jax.errors import UserError
from entrust_jax.segdiff import sampler as sampling
from entrust_jax.segdiff import schedule
from entrust_jax.segdiff.sampler import Sampler

SIZE, CLASSES, B = 9, 2, 0.3 / np.sqrt(2)
RADII, WEIGHTS = (0.0, 2.0, 3.0, 4.0), np.array([0.3, 0.7 / 3, 0.7 / 3, 0.7 / 3])
MASKS = discs(SIZE, RADII)
DENOISE = exact_denoiser(MASKS, WEIGHTS, B, CLASSES)
DRAWS, BIAS = 4096, 0.01  # the few-step bias of an exact denoiser at 64 steps
DDIM = Sampler(b=B, lambda_min=-12.0, lambda_max=8.5, steps=64, method="ddim", eta_min=0.0)
REGION = MASKS[3].astype(np.float32)  # where hypotheses can differ: the "conflict" of this law


def conflict_for_eta(eta, tau=0.1):
    """The conflict that an eta map with eta_min = 0 turns into eta."""
    return -tau * np.log1p(-np.minimum(eta, 1 - 1e-6))


def run(key, conflict, sampler, draws=DRAWS):
    arguments = {"sampler": sampler, "classes": CLASSES, "hypotheses": draws}
    return sampling.sample(DENOISE, None, conflict[None], jnp.array([3]), key, **arguments)[1][0]


RUN = jax.jit(run, static_argnames="sampler")


def draw_many(sampler, conflict, compiled=RUN):
    """DRAWS hypotheses of one case, [draws, size, size, classes]."""
    return np.asarray(compiled(jax.random.key(0), jnp.asarray(conflict, jnp.float32), sampler=sampler))


def mode_of(members):
    """Index of the mask that each hypothesis is nearest to, and its Hamming distance to it."""
    distance = (np.argmax(members, -1)[:, None] != MASKS[None]).sum((2, 3))
    return distance.argmin(1), distance.min(1)


def frequency_excess(modes):
    """Largest |frequency - weight| in units of what is allowed, 3 standard errors and the bias."""
    frequency = np.bincount(modes, minlength=len(WEIGHTS)) / len(modes)
    return np.max(np.abs(frequency - WEIGHTS) / (3 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / len(modes)) + BIAS))


ETA = 0.9 * REGION + 0.05
CASES = {
    "eta 0": (DDIM, np.zeros((SIZE, SIZE))),
    "eta 1": (Sampler(B, -12.0, 8.5, 64, "ancestral"), np.zeros((SIZE, SIZE))),
    "eta map": (DDIM, conflict_for_eta(ETA)),
    "complement of the map": (DDIM, conflict_for_eta(1 - ETA)),
    "dpmpp2m": (Sampler(B, -12.0, 8.5, 64, "dpmpp2m"), np.zeros((SIZE, SIZE))),
}


@pytest.mark.parametrize("name", CASES)
def test_mode_frequencies_with_exact_denoiser(name):
    members = draw_many(*CASES[name])
    modes, distance = mode_of(members)
    assert np.all(distance == 0), "a hypothesis that is none of the masks"
    assert frequency_excess(modes) <= 1
    np.testing.assert_allclose(members.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(members[..., 1].mean(0), np.tensordot(WEIGHTS, MASKS, 1), atol=0.04)


def test_temperature_in_conflict_fails_the_frequency_test(monkeypatch):
    """Negative control: noise x 1.6 where the modalities disagree manufactures uncertainty, and is
    noticed."""
    original = sampling._noise
    amplitude = jnp.asarray(1 + 0.6 * REGION)[None, ..., None]
    monkeypatch.setattr(sampling, "_noise", lambda *arguments: original(*arguments) * amplitude)
    # A function of its own, for the compiled one was traced with the right noise; twice the draws for power.
    fake = jax.jit(lambda key, conflict, sampler: run(key, conflict, sampler, 2 * DRAWS), static_argnames="sampler")
    modes, _ = mode_of(draw_many(*CASES["eta 1"], compiled=fake))
    assert frequency_excess(modes) > 1


def test_ancestral_variance_is_the_ddpm_posterior_variance():
    ancestral = Sampler(B, -12.0, 8.5, 16, "ancestral")
    row = sampling.transitions(ancestral)
    values = schedule.grid(16, -12.0, 8.5)
    alpha2, sigma2 = 1 / (1 + np.exp(-values)), 1 / (1 + np.exp(values))
    expected = sigma2[1:] / sigma2[:-1] * (1 - alpha2[:-1] / alpha2[1:])
    np.testing.assert_allclose(row.variance, expected, atol=1e-6, rtol=1e-5)

    # The whole step: mean and noise amplitude of q(x_s | x_t, x0 = D), Ho et al. 2020, eq. 7.
    i = 9
    at = jax.tree.map(lambda column: column[i], row)
    x, mean = jnp.full((1, 2, 2, 2), 0.7), jnp.full((1, 2, 2, 2), -0.2)
    eta = sampling.eta_map(jnp.zeros((1, 2, 2)), ancestral)
    go = lambda z: sampling.advance(x, mean, mean, eta, lambda: jnp.full_like(x, z), at, ancestral)  # noqa: E731
    ratio = np.sqrt(alpha2[i] / alpha2[i + 1])
    forward = 1 - ratio**2
    centre = ratio * sigma2[i + 1] / sigma2[i] * 0.7 + np.sqrt(alpha2[i + 1]) * forward / sigma2[i] * -0.2
    np.testing.assert_allclose(go(0.0), centre, atol=1e-6)
    np.testing.assert_allclose(jnp.square(go(1.0) - go(0.0)), expected[i], atol=1e-6)


def test_dpmpp2m_converges_faster_than_ddim():
    """Same noise, same ODE: at 12 steps the second-order solver is nearer to the fine solution than DDIM."""
    denoise = exact_denoiser(MASKS[:2], [0.5, 0.5], 1.0, CLASSES)
    start = jax.random.normal(jax.random.key(5), (64, SIZE, SIZE, CLASSES))

    @functools.partial(jax.jit, static_argnums=0)
    def solve(sampler):
        def step(carry, row):
            x, previous = carry
            mean = 2 * jax.nn.softmax(denoise(x, jnp.full((64,), row.log_snr), None)) - 1
            x = sampling.advance(x, mean, previous, jnp.zeros(x.shape[:-1]), lambda: jnp.zeros_like(x), row, sampler)
            return (x, mean), None

        return jax.lax.scan(step, (start, jnp.zeros_like(start)), sampling.transitions(sampler))[0][0]

    build = lambda method, steps: Sampler(1.0, -8.0, -2.5, steps, method, eta_min=0.0)  # noqa: E731
    fine = solve(build("ddim", 2000))
    errors = {method: float(jnp.abs(solve(build(method, 12)) - fine).mean()) for method in ("ddim", "dpmpp2m")}
    assert errors["dpmpp2m"] < 0.5 * errors["ddim"]


def smooth_denoise(x, log_snr, condition):
    """A stand-in network that mixes pixels and uses level and condition, for tests of keys and batching."""
    blurred = 0.5 * x + 0.25 * (jnp.roll(x, 1, 1) + jnp.roll(x, -1, 2))
    return 2 * blurred + condition[:, None, None, :] + 0.1 * log_snr[:, None, None, None]


SMALL = Sampler(0.2, -12.0, 6.0, 4, "ddim")
CONDITION = jnp.array([[0.3, -0.3], [0.1, 0.0], [-0.5, 0.4]])
CONFLICT = jnp.linspace(0, 1, 3 * 36).reshape(3, 6, 6)


@functools.partial(jax.jit, static_argnames=("hypotheses", "chunk"))
def run_jitted(rows, case, hypotheses, chunk):
    return sampling.sample(
        smooth_denoise,
        CONDITION[rows],
        CONFLICT[rows],
        case,
        jax.random.key(2),
        sampler=SMALL,
        classes=2,
        hypotheses=hypotheses,
        chunk=chunk,
    )


def run_small(rows, case, hypotheses=8, chunk=None):
    return run_jitted(jnp.asarray(rows), jnp.asarray(case), hypotheses, chunk)


def test_hypotheses_do_not_depend_on_the_batch():
    first, members = run_small([0, 1, 2], [10, 11, 12])
    for rows, case in (([2], [12]), ([2, 0, 0], [12, 10, 10])):
        alone_first, alone = run_small(rows, case)
        np.testing.assert_allclose(alone, members[jnp.array(rows)], atol=2e-6)
        np.testing.assert_allclose(alone_first, first[jnp.array(rows)], atol=2e-6)
    assert np.abs(np.asarray(members[:, 0] - members[:, 1])).max() > 0.05


def test_all_at_once_equals_chunks():
    _, members = run_small([0, 1, 2], [10, 11, 12])
    _, chunked = run_small([0, 1, 2], [10, 11, 12], chunk=3)  # does not divide 8
    np.testing.assert_allclose(chunked, members, atol=2e-6)


def test_one_hypothesis_alone_equals_its_place_in_the_set():
    _, members = run_small([0, 1, 2], [10, 11, 12])

    @jax.jit
    def single(n):
        case, key = jnp.array([10, 11, 12]), jax.random.key(2)
        return sampling.hypothesis(smooth_denoise, CONDITION, CONFLICT, case, key, n, sampler=SMALL, classes=2)

    for n in (0, 7):
        np.testing.assert_allclose(single(n), members[:, n], atol=2e-6)


def test_slices_of_one_scan_share_their_noise():
    _, members = run_small([0, 0, 0], [7, 7, 8])
    np.testing.assert_array_equal(members[0], members[1])
    assert np.abs(np.asarray(members[0] - members[2])).max() > 0.05


def test_one_step_is_shared_with_sample_and_pairs_conditions():
    case, key = jnp.array([10, 11, 12]), jax.random.key(2)
    first, _ = run_small([0, 1, 2], [10, 11, 12])
    arguments = {"sampler": SMALL, "shape": (6, 6), "classes": 2}
    run = jax.jit(lambda condition: sampling.one_step(smooth_denoise, condition, case, key, **arguments))
    again = run(CONDITION)
    np.testing.assert_allclose(again, first, atol=1e-6)
    # Same noise under another condition: a shift of both logits must cancel exactly in the softmax.
    shifted = run(CONDITION + 1)
    np.testing.assert_allclose(shifted, first, atol=1e-5)


def test_one_step_is_the_marginal():
    arguments = {"sampler": DDIM, "shape": (SIZE, SIZE), "classes": CLASSES}
    first = jax.jit(lambda key: sampling.one_step(DENOISE, None, jnp.arange(4), key, **arguments))(jax.random.key(0))
    np.testing.assert_allclose(first.mean(0)[..., 1], np.tensordot(WEIGHTS, MASKS, 1), atol=0.02)


def test_denoiser_is_evaluated_once_per_step_and_never_at_the_end():
    calls = []

    def denoise(x, log_snr, condition):
        jax.debug.callback(lambda value: calls.append(float(value)), log_snr[0])
        return x

    out = sampling.hypothesis(
        denoise, None, jnp.zeros((1, 2, 2)), jnp.array([1]), jax.random.key(0), 0, sampler=SMALL, classes=2
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), schedule.grid(4, -12.0, 6.0)[:-1], atol=1e-5)


def test_three_dimensions_and_several_classes():
    @jax.jit
    def run(key):
        conflict, case = jnp.zeros((2, 3, 4, 5)), jnp.array([0, 1])
        denoise = lambda x, log_snr, condition: 3 * x  # noqa: E731
        return sampling.sample(denoise, None, conflict, case, key, sampler=SMALL, classes=4, hypotheses=3)

    first, members = run(jax.random.key(0))
    assert first.shape == (2, 3, 4, 5, 4) and members.shape == (2, 3, 3, 4, 5, 4)
    np.testing.assert_allclose(members.sum(-1), 1, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="sampler"):
        Sampler(0.2, -12.0, 6.0, 4, "euler")
    with pytest.raises(UserError, match="lambda_min"):
        Sampler(0.2, 6.0, -12.0, 4)
    with pytest.raises(UserError, match="steps"):
        Sampler(0.2, -12.0, 6.0, 0)
