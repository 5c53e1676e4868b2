"""The exact law of a phantom against direct enumeration of truth, border and evidence on small scenes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.data import phantom, phantom_scene
from entrust_jax.data import phantom_law as exact
from entrust_jax.errors import UserError
from entrust_jax.metrics.distribution import ged_squared, mean_self_distance, pairwise_distance
from entrust_jax.trustmap import probing

BORDERS = (-0.6, 0.0, 0.7)
BINARY = phantom.Spec(radius=2.0, boundary=BORDERS)
CLASS = dataclasses.replace(BINARY, variant="class", prior=(0.4, 0.3))
BRAIN = phantom.Spec(
    modalities=("T1", "T2"), reliability=(0.9, 0.8), ignorance=(0.0, 0.0), radius=2.0, boundary=(-0.5, 0.7),
    variant="brain",
)  # fmt: skip
SPECS = pytest.mark.parametrize("spec", [BINARY, CLASS, BRAIN], ids=["binary", "class", "brain"])
BELIEF = {2: np.array([[0.35, 0.65], [0.88, 0.12]]), 3: np.array([[0.0, 0.8, 0.2], [0.55, 0.15, 0.3]])}
FOUR = phantom.Spec(modalities=tuple("ABCD"), reliability=(0.9,) * 4, ignorance=(0.0,) * 4)
THREE = phantom.Spec(
    modalities=tuple("ABC"), reliability=(0.9, 0.8, 0.8), ignorance=(0.1,) * 3, correlated=("B", "C", 0.76)
)


def geometry(shape, centres):
    """(nearest site within 2.7 or -1, distance to it) on a grid of pixels."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    far = np.linalg.norm(grid[..., None, :] - np.array(centres), axis=-1)
    distance = far.min(-1).astype(np.float32)
    return np.where(distance <= 2.7, far.argmin(-1), -1).astype(np.int32), distance


SITE, DISTANCE = geometry((1, 7, 11), [(0, 3.1, 2.6), (0, 2.8, 8.2)])


def enumerated(spec, belief, site, distance):
    """[(probability, label map)] over every truth and every border of every site, drawn pixel by pixel."""
    result = []
    shares = {"binary": ((1.0, 1),), "class": ((1.0, 1),), "brain": ((0.4, 1), (0.7, 3), (1.0, 2))}[spec.variant]
    per_site = [list(itertools.product(range(belief.shape[1]), spec.boundary)) for _ in belief]
    for state in itertools.product(*per_site):
        weight, label = 1.0, np.zeros(site.shape, np.int32)
        for j, (z, delta) in enumerate(state):
            weight *= belief[j, z] / len(spec.boundary)
            for index in zip(*np.nonzero(site == j), strict=True):
                for share, k in shares:
                    if z and distance[index] <= share * spec.radius + (delta if share == 1 else 0):
                        label[index] = z if spec.variant == "class" else k
                        break
        result.append((weight, label))
    return np.array([w for w, _ in result]), np.stack([m for _, m in result])


@functools.cache
def small(spec):
    """(law, probabilities and label maps by enumeration) of two sites on 7 x 11 pixels."""
    belief = BELIEF[spec.values]
    return exact.exact_law(belief, SITE, DISTANCE, spec), *enumerated(spec, belief, SITE, DISTANCE)


def merged(weight, maps):
    """{label map: probability}"""
    result = {}
    for w, m in zip(weight, maps, strict=True):
        result[m.astype(np.int32).tobytes()] = result.get(m.astype(np.int32).tobytes(), 0.0) + w
    return {m: w for m, w in result.items() if w > 0}


def dice(a, b, classes):
    """Mean Dice over the foreground classes, 1 where both lack it."""
    values = []
    for k in range(1, classes):
        size = (a == k).sum() + (b == k).sum()
        values.append(2 * ((a == k) & (b == k)).sum() / size if size else 1.0)
    return np.mean(values)


@SPECS
def test_joint_law_and_marginals(spec):
    law, weight, maps = small(spec)
    chance, states = exact.enumerate_maps(law)
    assert len(chance) == (1 + (spec.values - 1) * len(spec.boundary)) ** 2 < len(weight)
    ours, theirs = merged(chance, states), merged(weight, maps)
    assert ours.keys() == theirs.keys()
    assert all(ours[m] == pytest.approx(theirs[m], abs=1e-12) for m in ours)
    share = np.stack([weight @ (maps == k).reshape(len(maps), -1) for k in range(law.classes)], -1)
    share = share.reshape(*SITE.shape, law.classes)
    np.testing.assert_allclose(exact.marginals(law), share, atol=1e-12)
    by_formula = phantom.marginal(jnp.asarray(SITE), jnp.asarray(DISTANCE), jnp.asarray(BELIEF[spec.values]), spec)
    np.testing.assert_allclose(by_formula, share, atol=1e-6)
    if spec.values == 2:
        alone = phantom.marginal(jnp.asarray(SITE), jnp.asarray(DISTANCE), jnp.asarray(BELIEF[2][:, 1]), spec)
        np.testing.assert_allclose(alone, share, atol=1e-6)


@SPECS
def test_pairwise_disagreement_is_the_chance_that_two_draws_differ(spec):
    law, weight, maps = small(spec)
    differ = np.einsum("s,t,stdhw->dhw", weight, weight, maps[:, None] != maps[None])
    share = exact.marginals(law)
    assert exact.pairwise_disagreement(share) == pytest.approx(differ.mean())
    assert exact.pairwise_disagreement(share, SITE == 1) == pytest.approx(differ[SITE == 1].mean())
    assert np.isnan(exact.pairwise_disagreement(share, SITE == 2))


@SPECS
def test_distances_equal_enumeration(spec):
    law, weight, maps = small(spec)
    foreground = range(1, law.classes)
    within = weight @ pairwise_distance(maps, maps, foreground) @ weight
    assert exact.mean_distance(law) == pytest.approx(within, abs=1e-12)
    stray = np.array(maps[[0, 5, -1, 7]])
    stray[1, 0, 0, 0] = 1  # foreground that the law cannot have
    stray[3] = law.classes - 1
    between = pairwise_distance(stray, maps, foreground)
    np.testing.assert_allclose(exact.distance_to(law, stray), between @ weight, atol=1e-12)
    own = pairwise_distance(stray, stray, foreground)
    for estimator in ("v", "u"):
        expected = 2 * (between @ weight).mean() - mean_self_distance(own, estimator) - within
        assert exact.ged_squared(law, stray, estimator) == pytest.approx(expected, abs=1e-12)


def test_ged_of_the_whole_law_is_zero_and_of_a_fake_is_not():
    """Every state as often as the law has it: nothing is left. Fewer states, or pixels on their own: something is."""
    belief = np.full((2, 2), 0.5)
    law = exact.exact_law(belief, SITE, DISTANCE, BINARY)
    weight, maps = enumerated(BINARY, belief, SITE, DISTANCE)
    np.testing.assert_allclose(weight, weight[0])
    assert exact.ged_squared(law, maps) == pytest.approx(0, abs=1e-12)
    assert exact.ged_squared(law, maps[:18]) > 0.05
    noise = np.random.default_rng(0).random((36, *SITE.shape)) < exact.marginals(law)[..., 1]
    assert exact.ged_squared(law, noise.astype(np.int32)) > 0.05


@SPECS
def test_raters_are_draws_from_the_law(spec):
    law, weight, maps = small(spec)
    drawn = exact.raters(jax.random.key(4), law, 6000)
    assert drawn.shape == (6000, *SITE.shape)
    np.testing.assert_array_equal(drawn[:5], exact.raters(jax.random.key(4), law, 6000)[:5])
    assert (exact.raters(jax.random.key(5), law, 6000) != drawn).any()
    seen, expected = merged(np.full(6000, 1 / 6000), drawn), merged(weight, maps)
    assert seen.keys() <= expected.keys()
    for key, p in expected.items():
        assert abs(seen.get(key, 0.0) - p) < 5 * np.sqrt(p * (1 - p) / 6000)
    shown = np.stack([(drawn[:, here] > 0).any(1) for here in (SITE == 0, SITE == 1)])
    assert np.array_equal(shown[0], np.ones(6000, bool)) or abs(np.corrcoef(shown)[0, 1]) < 0.05


def test_ged_of_raters_has_the_expectation_that_theory_gives():
    """N draws against the law itself leave E d / N (V) and 0 (U); against one rater (1 + 1/N) E d."""
    law, _, _ = small(BINARY)
    inside = exact.mean_distance(law)
    drawn = exact.raters(jax.random.key(0), law, 640).reshape(80, 8, *SITE.shape)
    by_law = np.array([[exact.ged_squared(law, x, e) for e in ("v", "u")] for x in drawn])
    error = by_law.std(0) / np.sqrt(80)
    assert np.all(np.abs(by_law.mean(0) - [inside / 8, 0]) < 4 * error) and error.max() < inside / 16
    truth = exact.raters(jax.random.key(1), law, 80)
    single = []
    for x, y in zip(drawn, truth, strict=True):
        own = pairwise_distance(x, x, (1,))
        single.append(ged_squared(pairwise_distance(x, y[None], (1,)), own, np.zeros((1, 1))))
    assert abs(np.mean(single) - 9 / 8 * inside) < 4 * np.std(single) / np.sqrt(80)


@SPECS
def test_expected_dice_and_the_best_threshold_equal_enumeration(spec):
    law, weight, maps = small(spec)
    share = exact.marginals(law)
    winner, foreground = 1 + share[..., 1:].argmax(-1), 1 - share[..., 0]
    scores = {}
    for tau in np.linspace(0.0005, 0.9995, 1000):
        mask = np.where(foreground > tau, winner, 0).astype(np.int32)
        if mask.tobytes() not in scores:
            scores[mask.tobytes()] = weight @ [dice(mask, m, law.classes) for m in maps]
            assert exact.expected_dice(law, mask[None])[0] == pytest.approx(scores[mask.tobytes()], abs=1e-12)
    best, tau, score = exact.dice_action(law)
    assert len(scores) > 3 and score == pytest.approx(max(scores.values()), abs=1e-12)
    assert scores[best.tobytes()] == pytest.approx(score, abs=1e-12)
    np.testing.assert_array_equal(best, np.where(np.round(foreground, 12) > tau, winner, 0))
    coarse, tau, value = exact.dice_action(law, (0.9, 0.5))
    assert tau in (0.5, 0.9) and value <= score + 1e-12
    np.testing.assert_array_equal(coarse, np.where(foreground > tau, winner, 0))


@pytest.mark.parametrize("chance", [(0.9, 0.45), (0.6, 0.55), (0.3, 0.2), (0.97, 0.35)])
def test_dice_action_against_every_subset_of_pixels(chance):
    """Two small lesions of 4 and 8 pixels: 4096 masks, each scored against every truth and border. Here the best of
    all is a threshold of the marginal."""
    spec = dataclasses.replace(BINARY, radius=1.0, boundary=(-0.2, 0.6))
    site, distance = geometry((1, 4, 9), [(0, 1.5, 1.5), (0, 1.5, 6.5)])
    site = np.where(distance <= 1.6, site, -1).astype(np.int32)
    site[(site == 0) & (distance > 1)] = -1
    site[0, ::3, 5:] = -1
    belief = np.array([[1 - p, p] for p in chance])
    law = exact.exact_law(belief, site, distance, spec)
    weight, maps = enumerated(spec, belief, site, distance)
    truth = maps[:, site >= 0].astype(np.float64)
    pixels = truth.shape[1]
    assert [np.sum(site == j) for j in range(2)] == [4, 8]
    every = (np.arange(2**pixels)[:, None] >> np.arange(pixels) & 1).astype(np.float64)
    size = every.sum(1)[:, None] + truth.sum(1)[None]
    score = np.where(size > 0, 2 * every @ truth.T / np.maximum(size, 1), 1.0) @ weight
    mask, _, value = exact.dice_action(law)
    assert value == pytest.approx(score.max(), abs=1e-9)
    assert not mask[site < 0].any()


def test_the_best_map_need_not_be_a_threshold():
    """A doubtful small lesion and a less likely large one: what the docstring of dice_action says."""

    def one(chance, sizes, start):
        mask = np.array([[int(i < n) for i in range(max(sizes))] for n in (0, *sizes)])
        weight = np.array([1 - chance, *[chance / len(sizes)] * len(sizes)])
        return exact.SiteLaw(weight, np.arange(start, start + max(sizes)), mask)

    law = exact.Law((32,), 2, (one(0.263, (20,), 0), one(0.52, (10, 12), 20)))
    every = np.zeros((6, 32), np.int32)
    for row, (large, small) in zip(every, itertools.product((0, 20), (0, 10, 12)), strict=True):
        row[:large] = 1
        row[20 : 20 + small] = 1
    best = exact.expected_dice(law, every).max()
    assert 0.001 < best - exact.dice_action(law)[2] < 0.01


# --- blame ----------------------------------------------------------------------------------------------------


def readings(spec):
    """[(z, displays of each reader, probability)], the generator's story told outcome by outcome."""
    odds = (spec.prior,) if isinstance(spec.prior, float) else spec.prior
    table = None
    if spec.correlated:
        i, j = (spec.modalities.index(name) for name in spec.correlated[:2])
        table = phantom.correct_table(spec)
    result = []
    count = len(spec.modalities)
    for z, *outcome in itertools.product(range(len(odds) + 1), *[((1, 1), (1, 0), (0, 1), (0, 0))] * count):
        weight, said = (1 - sum(odds), *odds)[z], []
        for m, (right, shown) in enumerate(outcome):
            if table is None or m not in (i, j):
                weight *= spec.reliability[m] if right else 1 - spec.reliability[m]
            weight *= 1 - spec.ignorance[m] if shown else spec.ignorance[m]
            other = 3 - z if spec.variant == "class" else 1 if z == 0 else -1
            true = z or -1
            wrongly = -1 if spec.variant == "class" and z == 0 else other
            said.append((true if right else wrongly) if shown else 0)
        if table is not None:
            weight *= table[1 - outcome[i][0], 1 - outcome[j][0]]
        if weight:
            result.append((z, tuple(said), weight))
    return result


def enumerated_blame(spec, liars=None):
    """The rate by brute force, Shapley values as the mean over all orders in which the readers may speak."""
    outcomes = readings(spec)
    count = len(spec.modalities)

    @functools.cache
    def odds(heard):
        """P(z | what these readers display), from the outcomes; None for a reader who has not spoken."""
        total = np.zeros(spec.values)
        for z, said, weight in outcomes:
            if all(h is None or h == s for h, s in zip(heard, said, strict=True)):
                total[z] += weight
        return total / total.sum()

    @functools.cache
    def named(said):
        whole = odds(said)
        answer = int(np.flatnonzero(whole > whole.max() - 1e-9)[0])
        phi = np.zeros(count)
        orders = list(itertools.permutations(range(count)))
        for order in orders:
            heard = [None] * count
            before = np.log(odds(tuple(heard))[answer])
            for m in order:
                heard[m] = said[m]
                after = np.log(odds(tuple(heard))[answer])
                phi[m] += (after - before) / len(orders)
                before = after
        phi = np.where(np.array(said) != 0, phi, np.inf)
        return phi <= phi.min() + 1e-9

    hit = possible = 0.0
    for z, said, weight in outcomes:
        shown = {s for s in said if s}
        wrong = np.array([s not in (0, z or -1) for s in said])
        if len(shown) < 2 or liars not in (None, wrong.sum()):
            continue
        possible += weight
        hit += weight * wrong[named(said)].mean()
    return hit / possible


@pytest.mark.parametrize(
    ("spec", "rate"),
    [
        (phantom.Spec(reliability=(0.9, 0.9)), 0.50),
        (phantom.Spec(reliability=(0.9, 0.8)), 0.69),
        (phantom.Spec(reliability=(0.95, 0.7)), 0.89),
        (FOUR, 0.919),
        (dataclasses.replace(CLASS, reliability=(0.95, 0.7), prior=(0.35, 0.35)), 0.89),
        (dataclasses.replace(CLASS, reliability=(0.9, 0.7), prior=(0.5, 0.2)), None),
        (THREE, None),
    ],
    ids=[".9/.9", ".9/.8", ".95/.7", "four", "class", "uneven classes", "correlated"],
)
def test_blame_rate_equals_enumeration(spec, rate):
    value = exact.blame_rate(spec)
    assert value == pytest.approx(enumerated_blame(spec), abs=1e-5)
    if rate is not None:
        assert value == pytest.approx(rate, abs=0.005)


def test_blame_where_one_of_four_readers_lies():
    assert exact.blame_rate(FOUR, liars=1) == pytest.approx(1)
    assert exact.blame_rate(FOUR, liars=2) == pytest.approx(0.5)
    assert exact.blame_rate(FOUR, liars=3) == pytest.approx(0, abs=1e-9)
    silent = dataclasses.replace(FOUR, ignorance=(0.1,) * 4)
    one = exact.blame_rate(silent, liars=1)
    assert one == pytest.approx(enumerated_blame(silent, liars=1), abs=1e-5) and one >= 0.9
    without = exact.blame_rate(FOUR, [True, True, False, False])
    assert without == pytest.approx(0.5)
    assert np.isnan(exact.blame_rate(FOUR, [True, False, False, False]))


def test_contributions_are_shapley_values():
    """Those of the probes on the same game; at (.95, .7) the honest reader has the largest, the liar the smallest."""
    pair = phantom.Spec(reliability=(0.95, 0.7))
    phi = exact.contributions(np.array([[1, 1, 0], [-1, 0, 0]]), np.ones(2, bool), pair)
    np.testing.assert_allclose(phi[:, 0], [0.865, -0.288], atol=1e-3)
    np.testing.assert_allclose(phi[:, 1], [np.log(0.95 / 0.5), 0], atol=1e-5)
    np.testing.assert_allclose(phi[:, 2], 0, atol=1e-6)
    said = np.array([[1], [-1], [-1]])
    values = []
    for row in probing.subsets(3):
        values.append(jnp.log(phantom.posterior(jnp.asarray(said), jnp.asarray(row > 0), THREE)))
    np.testing.assert_allclose(
        exact.contributions(said, np.ones(3, bool), THREE), probing.shapley(jnp.stack(values)), atol=1e-5
    )
    absent = exact.contributions(said, np.array([True, False, True]), THREE)
    assert absent[1, 0] == 0 and absent[0, 0] > 0 > absent[2, 0]


# --- a scene, and limits ----------------------------------------------------------------------------------------


def test_law_of_a_scene_for_every_subset_of_modalities():
    """12 x 12 pixels, one site: the law and the marginals of the scene agree, whatever is absent."""
    spec = phantom.Spec(
        size=(12, 12), sites=1, radius=1.2, boundary=(-0.4, 0.0, 0.3), jitter=0.0, variant="class", prior=(0.3, 0.4)
    )
    drawn = jax.tree.map(np.asarray, phantom_scene.scenes(spec, range(6), 1))
    for i, present in itertools.product(range(6), itertools.product((True, False), repeat=2)):
        belief = phantom.belief(jnp.asarray(drawn.evidence[i]), jnp.array(present), spec)
        law = exact.exact_law(belief, drawn.site[i], drawn.distance[i], spec)
        by_formula = phantom.marginal(jnp.asarray(drawn.site[i]), jnp.asarray(drawn.distance[i]), belief, spec)
        np.testing.assert_allclose(exact.marginals(law), by_formula, atol=1e-6)
        weight, maps = enumerated(spec, np.asarray(belief, np.float64), drawn.site[i], drawn.distance[i])
        distance = weight @ pairwise_distance(maps, maps, (1, 2)) @ weight
        assert exact.mean_distance(law) == pytest.approx(distance, abs=1e-6)
        if all(present):
            np.testing.assert_allclose(exact.marginals(law), drawn.marginal[i], atol=1e-6)
            assert any((m == drawn.label[i]).all() and w > 0 for w, m in zip(weight, maps, strict=True))


def test_too_large_a_law_is_a_clear_error(monkeypatch):
    law, _, maps = small(BINARY)
    monkeypatch.setattr(exact, "MOST_MAPS", 15)
    with pytest.raises(UserError, match="2 sites make 16 label maps, more than 15"):
        exact.enumerate_maps(law)
    monkeypatch.setattr(exact, "MOST_SUMS", 15)
    with pytest.raises(UserError, match="more than 15 different overlaps"):
        exact.mean_distance(law)
    with pytest.raises(UserError, match="more than 15 different overlaps"):
        exact.expected_dice(law, maps[-1:])
    many = phantom.Spec(modalities=tuple("ABCDEFGH"), reliability=(0.9,) * 8, ignorance=(0.1,) * 8)
    with pytest.raises(UserError, match="8 readers"):
        exact.blame_rate(many)
