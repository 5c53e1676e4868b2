"""The phantom and its scenes: its closed-form posterior against enumeration, its law, its images and its files."""

import dataclasses
import functools
import hashlib
import itertools

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest

from entrust_jax.data import layouts, phantom, phantom_scene, preprocess
from entrust_jax.data.body import coordinates
from entrust_jax.errors import UserError

TWO = phantom.Spec(size=(32, 32), sites=2, radius=3.0, prior=0.3, ignorance=(0.1, 0.2), jitter=0.4)
BRAIN = phantom.Spec(
    size=(48, 48),
    modalities=("T1", "T1ce", "T2", "FLAIR"),
    reliability=(0.75, 0.9, 0.8, 0.9),
    ignorance=(0.1,) * 4,
    radius=4.0,
    jitter=0.5,
    variant="brain",
)
BOTH = jnp.ones(2, bool)
SLAB = dataclasses.replace(BRAIN, depth=12, radius=3.5)
BINARY = phantom.Spec(size=(48, 48), radius=4.0, jitter=0.5)
CLASS = dataclasses.replace(BINARY, variant="class", prior=(0.4, 0.3), reliability=(0.85, 0.7))
THREE = phantom.Spec(
    modalities=("A", "B", "C"), reliability=(0.9, 0.8, 0.7), ignorance=(0.2, 0.1, 0.3), correlated=("C", "A", 0.66)
)
LABEL_MAP = ((0, 0), (1, 1), (2, 2), (4, 3))


@functools.cache
def draw(spec, count=160, seed=3):
    """Scenes 0 ... count - 1 as numpy arrays; few sizes, because each one is compiled."""
    return jax.tree.map(np.asarray, phantom_scene.scenes(spec, range(count), seed))


def reading(said, correct, silent):
    """P(a reader displays `said` | the truth is a lesion)."""
    return {0: silent, 1: (1 - silent) * correct, -1: (1 - silent) * (1 - correct)}[said]


def test_marginal_equals_enumeration_of_truth_and_boundary():
    """Bayes by brute force: every z, every delta, the likelihood of all evidence, the label drawn for
    each."""
    drawn = draw(TWO)
    for i in range(12):
        evidence, site, distance = drawn.evidence[i], drawn.site[i], drawn.distance[i]
        total, expected = 0.0, np.zeros(site.shape)
        for z in itertools.product((0, 1), repeat=2):
            for delta in itertools.product(TWO.boundary, repeat=2):
                weight = 1.0
                for j in range(2):
                    weight *= TWO.prior if z[j] else 1 - TWO.prior
                    for m in range(2):
                        said = int(evidence[m, j]) * (1 if z[j] else -1)
                        weight *= reading(said, TWO.reliability[m], TWO.ignorance[m])
                label = np.zeros(site.shape)
                for j in range(2):
                    label[(site == j) & (distance <= TWO.radius + delta[j])] = z[j]
                total += weight
                expected += weight * label
        np.testing.assert_allclose(drawn.marginal[i, ..., 1], expected / total, atol=1e-5)
        np.testing.assert_allclose(drawn.marginal[i].sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "rho, agree, oppose, conflict, brier, nll",
    [
        ((0.9, 0.9), 0.988, 0.500, 0.18, 0.0549, 0.1788),
        ((0.9, 0.8), 0.973, 0.692, 0.26, 0.0748, 0.2524),
        ((0.95, 0.7), 0.978, 0.891, 0.32, 0.0458, 0.1825),
        ((0.9,), 0.900, None, 0.0, 0.0900, 0.3251),
    ],
)
def test_bayes_optimal_scores(rho, agree, oppose, conflict, brier, nll):
    """Known values at even odds: posterior for ++ and +-, share of conflict, best Brier score and log
    loss."""
    full = rho if len(rho) == 2 else (*rho, 0.7)
    spec = phantom.Spec(reliability=full, ignorance=(0.0, 0.0))
    present = jnp.array([True, len(rho) == 2])
    belief = lambda s: float(phantom.posterior(jnp.array(s)[:, None], present, spec)[0])  # noqa: E731
    assert belief([1, 1]) == pytest.approx(agree, abs=1e-3)
    if oppose is not None:
        assert belief([1, -1]) == pytest.approx(oppose, abs=1e-3)
    shares, scores = 0.0, np.zeros(2)
    for z, s in itertools.product((0, 1), itertools.product((1, -1), repeat=2)):
        weight = 0.5 * np.prod([reading(v if z else -v, r, 0.0) for v, r in zip(s, full, strict=True)])
        p = belief(s)
        scores += weight * np.array([(p - z) ** 2, -np.log(p if z else 1 - p)])
        shares += weight * float(phantom.opposed(jnp.array(s)[:, None], present)[0])
    assert shares == pytest.approx(conflict, abs=1e-3)
    np.testing.assert_allclose(scores, [brier, nll], atol=1e-3)


def test_missing_modality_and_silence():
    said = jnp.array([[1, 0, 1], [-1, 0, 0]])
    np.testing.assert_allclose(phantom.posterior(said, jnp.array([True, False]), TWO)[1], TWO.prior, atol=1e-6)
    alone = phantom.posterior(said, jnp.array([True, False]), TWO)[0]
    np.testing.assert_allclose(alone, 0.3 * 0.95 / (0.3 * 0.95 + 0.7 * 0.05), atol=1e-6)
    np.testing.assert_allclose(phantom.posterior(said, jnp.zeros(2, bool), TWO), TWO.prior, atol=1e-6)
    np.testing.assert_array_equal(phantom.opposed(said, BOTH), [True, False, False])
    np.testing.assert_array_equal(phantom.opposed(said, jnp.array([True, False])), [False] * 3)
    np.testing.assert_array_equal(phantom.silent(said, BOTH), [False, True, True])
    np.testing.assert_array_equal(phantom.silent(said, jnp.array([True, False])), [False, True, False])


def test_posterior_is_the_frequency_of_the_truth():
    """The generator obeys its own formula: among sites with the same evidence, z = 1 as often as the
    posterior says."""
    truth, evidence = jax.jit(jax.vmap(lambda k: phantom.draw_evidence(k, TWO)))(
        jax.random.split(jax.random.key(1), 20000)
    )
    truth, evidence = np.asarray(truth), np.asarray(evidence)
    np.testing.assert_allclose((evidence == 0).mean((0, 2)), TWO.ignorance, atol=0.01)
    for pattern in itertools.product((-1, 0, 1), repeat=2):
        here = (evidence == np.array(pattern)[:, None]).all(1)
        p = float(phantom.posterior(jnp.array(pattern)[:, None], BOTH, TWO)[0])
        assert abs(truth[here].mean() - p) < 4 * np.sqrt(p * (1 - p) / here.sum()) + 1e-3, pattern
    assert abs(np.corrcoef(truth[:, 0], truth[:, 1])[0, 1]) < 0.03


def joint_law(spec):
    """P(z, what each reader displays) at one site, {(z, displays): probability}, told as the generator's story."""
    result = {}
    odds = (spec.prior,) if isinstance(spec.prior, float) else spec.prior
    count = len(spec.modalities)
    first, second, both = spec.correlated or (None, None, None)
    for z, correct, shows in itertools.product(
        range(len(odds) + 1),
        itertools.product((True, False), repeat=count),
        itertools.product((True, False), repeat=count),
    ):
        weight = (1 - sum(odds), *odds)[z]
        for name, right, rho in zip(spec.modalities, correct, spec.reliability, strict=True):
            if name not in (first, second):
                weight *= rho if right else 1 - rho
        if both is not None:
            i, j = spec.modalities.index(first), spec.modalities.index(second)
            alone = spec.reliability[i] - both, spec.reliability[j] - both
            table = {(1, 1): both, (1, 0): alone[0], (0, 1): alone[1], (0, 0): 1 - both - sum(alone)}
            weight *= table[correct[i], correct[j]]
        displays = []
        for right, shown, silent in zip(correct, shows, spec.ignorance, strict=True):
            weight *= 1 - silent if shown else silent
            if spec.variant == "class":
                said = -1 if z == 0 else z if right else 3 - z
            else:
                said = 1 if right == bool(z) else -1
            displays.append(said if shown else 0)
        result[z, tuple(displays)] = result.get((z, tuple(displays)), 0.0) + weight
    assert sum(result.values()) == pytest.approx(1)
    return result


@pytest.mark.parametrize(
    "spec",
    [
        THREE,
        dataclasses.replace(THREE, prior=(0.2, 0.45), variant="class"),
        dataclasses.replace(THREE, prior=(0.2, 0.45), variant="class", correlated=None),
        phantom.Spec(modalities=tuple("ABCD"), reliability=(0.9,) * 4, ignorance=(0.1,) * 4, prior=0.3),
    ],
    ids=["correlated", "correlated classes", "classes", "four readers"],
)
def test_posterior_of_any_subset_equals_enumeration(spec):
    """What absent readers would have displayed is summed out of the joint law, silence is seen."""
    law = joint_law(spec)
    patterns = sorted({said for _, said in law})
    for present in itertools.product((True, False), repeat=len(spec.modalities)):
        got = np.asarray(phantom.belief(jnp.array(patterns).T, jnp.array(present), spec))
        seen = {said: tuple(s for s, here in zip(said, present, strict=True) if here) for said in patterns}
        sums = {}
        for (z, said), weight in law.items():
            sums.setdefault(seen[said], np.zeros(spec.values))[z] += weight
        expected = np.array([sums[seen[said]] / sums[seen[said]].sum() for said in patterns])
        np.testing.assert_allclose(got, expected, atol=2e-6)
    there = jnp.array(present)
    np.testing.assert_allclose(phantom.posterior(jnp.array(patterns).T, there, spec), 1 - got[:, 0], atol=2e-6)


def test_correlated_readers_count_less_than_independent_ones():
    """Two readers that mostly err together outvote a third if taken for independent, and do not in truth."""
    spec = phantom.Spec(
        modalities=("A", "B", "C"), reliability=(0.9, 0.8, 0.8), ignorance=(0.1,) * 3, correlated=("B", "C", 0.76)
    )
    said, present = jnp.array([[1], [-1], [-1]]), jnp.ones(3, bool)
    np.testing.assert_allclose(phantom.correct_table(spec), [[0.76, 0.04], [0.04, 0.16]], atol=1e-12)
    assert float(phantom.posterior(said, present, spec)[0]) == pytest.approx(0.9 * 0.16 / (0.9 * 0.16 + 0.1 * 0.76))
    independent = dataclasses.replace(spec, correlated=None)
    assert float(phantom.posterior(said, present, independent)[0]) == pytest.approx(0.36, abs=1e-3)
    product = dataclasses.replace(spec, correlated=("B", "C", 0.64))
    np.testing.assert_allclose(
        phantom.posterior(said, present, product), phantom.posterior(said, present, independent), atol=1e-6
    )
    one = jnp.array([True, True, False])
    np.testing.assert_allclose(phantom.posterior(said, one, spec), phantom.posterior(said, one, independent), atol=1e-6)


@pytest.mark.parametrize(
    "spec", [THREE, dataclasses.replace(THREE, prior=(0.2, 0.45), variant="class")], ids=["binary", "class"]
)
def test_evidence_is_drawn_from_the_joint_law(spec):
    draws = 40000
    truth, evidence = jax.jit(jax.vmap(lambda k: phantom.draw_evidence(k, spec)))(
        jax.random.split(jax.random.key(2), draws)
    )
    law = joint_law(spec)
    rows = np.concatenate([np.asarray(truth, np.int32)[:, None], np.asarray(evidence)], axis=1)  # [n 1+m j]
    rows = np.moveaxis(rows, 2, 1).reshape(-1, rows.shape[1])
    seen, counts = np.unique(rows, axis=0, return_counts=True)
    for row, count in zip(seen, counts, strict=True):
        p = law[int(row[0]), tuple(int(v) for v in row[1:])]  # KeyError: what cannot be was drawn
        assert abs(count / len(rows) - p) < 5 * np.sqrt(p / len(rows)), row
    assert sum(p for p in law.values() if p > 1e-3) > 0.95


def test_class_conflict():
    """Readers agree that a lesion is there and disagree on its class."""
    drawn = draw(CLASS)
    assert drawn.truth.dtype == np.int32 and set(np.unique(drawn.label)) == {0, 1, 2}
    shown = drawn.evidence != 0
    assert (drawn.evidence[shown] == -1).tolist() == (
        np.broadcast_to(drawn.truth[:, None], shown.shape)[shown] == 0
    ).tolist()
    opposite = shown.all(1) & (drawn.evidence[:, 0] != drawn.evidence[:, 1])
    assert opposite.sum() > 50 and (drawn.truth[opposite] > 0).all()
    np.testing.assert_array_equal(drawn.guilty.any(1), opposite)
    assert (drawn.guilty.sum(1)[opposite] == 1).all()
    np.testing.assert_array_equal(drawn.guilty[:, 0][opposite], (drawn.evidence[:, 0] != drawn.truth)[opposite])
    np.testing.assert_allclose(drawn.posterior[opposite], 1, atol=1e-6)
    # ours says 1 and theirs 2: P(1) = .4 .85 .3 / (.4 .85 .3 + .3 .15 .7)
    one = opposite & (drawn.evidence[:, 0] == 1)
    np.testing.assert_allclose(drawn.belief[one][:, 1], 0.102 / (0.102 + 0.0315), atol=1e-6)
    assert not (drawn.conflict & drawn.ignorance).any() and not (drawn.conflict & drawn.boundary).any()
    at_conflict = np.take_along_axis(opposite, np.maximum(drawn.site, 0).reshape(160, -1), 1).reshape(drawn.site.shape)
    core = (drawn.site >= 0) & (drawn.distance <= CLASS.radius) & ~drawn.boundary
    np.testing.assert_array_equal(drawn.conflict, core & at_conflict)
    np.testing.assert_allclose(drawn.marginal.sum(-1), 1, atol=1e-6)
    assert drawn.boundary.any() and drawn.ignorance.any()


def test_readers_may_be_reliable_at_different_places():
    spec = dataclasses.replace(TWO, sites=2, prior=0.5, reliability=((0.95, 0.7), (0.7, 0.95)))
    opposed = jnp.array([[1, 1], [-1, -1]])  # the first says lesion at both sites, the second at neither
    odds = (0.95 / 0.05) * (0.3 / 0.7)
    np.testing.assert_allclose(phantom.posterior(opposed, BOTH, spec), [odds / (1 + odds), 1 / (1 + odds)], rtol=1e-5)
    np.testing.assert_allclose(phantom.posterior(opposed, jnp.array([True, False]), spec), [0.95, 0.7], rtol=1e-5)
    z, said = jax.vmap(lambda key: phantom.draw_evidence(key, spec))(jax.random.split(jax.random.key(0), 4000))
    right = (said == jnp.where(z, 1, -1)[:, None]).sum(0) / (said != 0).sum(0)
    np.testing.assert_allclose(right, [[0.95, 0.7], [0.7, 0.95]], atol=0.03)
    with pytest.raises(ValueError, match="last axis"):
        phantom.posterior(jnp.ones((2, 3), jnp.int32), BOTH, spec)
    with pytest.raises(UserError, match="one for each site"):
        dataclasses.replace(TWO, sites=2, reliability=((0.9, 0.8, 0.7), 0.9))


def test_one_liar_among_four_readers():
    spec = phantom.Spec(modalities=tuple("ABCD"), reliability=(0.9,) * 4, ignorance=(0.0,) * 4)
    said = jnp.array([[1, -1], [1, 1], [-1, 1], [1, 1]])
    present = jnp.ones(4, bool)
    np.testing.assert_allclose(phantom.posterior(said, present, spec), 81 / 82, atol=1e-6)
    np.testing.assert_allclose(phantom.posterior(said, present.at[0].set(False), spec), [0.9, 729 / 730], atol=1e-6)
    np.testing.assert_array_equal(phantom.opposed(said, present), [True, True])
    np.testing.assert_array_equal(phantom.opposed(said, present.at[2].set(False)), [False, True])
    np.testing.assert_array_equal(
        phantom.wrong(said, jnp.array([True, True])), [[False, True], [False, False], [True, False], [False, False]]
    )


def test_existing_phantoms_stay_as_they_are():
    """Trained examples rest on these cases: evidence and label to the bit, the image up to rounding."""
    known = {
        TWO: ("a7f18d6ca4096600", "bd8a276869debeae", 3654743.17),
        BRAIN: ("fb08ffb41d9d29b8", "0568f5ccc85c9b6f", 23414879.01),
    }
    for spec, (evidence, label, total) in known.items():
        drawn = draw(spec)
        for array, digest in ((drawn.evidence, evidence), (drawn.label, label)):
            assert hashlib.sha256(np.ascontiguousarray(array[:8]).tobytes()).hexdigest()[:16] == digest
        assert drawn.image[:8].sum(dtype=np.float64) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("spec", [TWO, BRAIN, CLASS], ids=["binary", "brain", "class"])
def test_label_frequencies_equal_the_mean_marginal(spec):
    drawn = draw(spec)
    for k in range(len(spec.classes)):
        share = (drawn.label == k).mean((1, 2, 3))
        gap = share - drawn.marginal[..., k].mean((1, 2, 3))
        assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(160) + 1e-6
        assert share.max() > 0
    assert drawn.label[~drawn.body].max() == 0


def test_masks_and_guilt():
    drawn = draw(TWO)
    assert not (drawn.conflict & drawn.boundary).any() and not (drawn.conflict & drawn.ignorance).any()
    sure = drawn.site[drawn.conflict]
    assert sure.size and (sure >= 0).all()
    opposite = drawn.evidence[:, 0] * drawn.evidence[:, 1] == -1
    np.testing.assert_array_equal(drawn.guilty.any(1), opposite)
    assert (drawn.guilty.sum(1)[opposite] == 1).all()  # of two that contradict each other one is wrong
    blame = drawn.guilty[:, 0][opposite].mean()  # reader 1 wrong and 2 right against the reverse
    assert blame == pytest.approx(0.05 * 0.7 / (0.05 * 0.7 + 0.95 * 0.3), abs=0.06)
    certain = ~drawn.boundary & (drawn.site >= 0)
    values = drawn.marginal[..., 1]
    belief = np.take_along_axis(drawn.posterior, np.maximum(drawn.site, 0).reshape(160, -1), 1).reshape(values.shape)
    np.testing.assert_allclose(values[certain], belief[certain], atol=1e-6)


@pytest.mark.parametrize("spec", [BINARY, CLASS, BRAIN], ids=["binary", "class", "brain"])
def test_evidence_is_readable_in_every_modality(spec):
    """From pixels alone: the profile around each site, after removal of gain, names the evidence without a
    mistake."""
    drawn = draw(spec)
    layer = np.digitize(drawn.distance, [0.35 * spec.radius, 0.7 * spec.radius, 0.9 * spec.radius])
    for m in range(len(spec.modalities)):
        profiles, said = [], []
        for i, j in itertools.product(range(60), range(spec.sites)):
            near = drawn.distance[i] < spec.radius + 6
            here = near & (nearest_site(drawn, spec, i) == j)
            ground = here & (drawn.distance[i] > spec.radius + 4)
            level = drawn.image[i, m][ground & drawn.body[i]].mean()
            rows = [drawn.image[i, m][here & (layer[i] == part)].mean() / level - 1 for part in range(3)]
            profiles.append(rows)
            said.append(drawn.evidence[i, m, j])
        profiles, said = np.array(profiles), np.array(said)
        centres = {s: profiles[:120][said[:120] == s].mean(0) for s in np.unique(said)}
        guess = [min(centres, key=lambda s: np.abs(p - centres[s]).sum()) for p in profiles[120:]]
        np.testing.assert_array_equal(guess, said[120:])


def nearest_site(drawn, spec, i):
    """Index of the nearest site for pixels just beyond its reach too: the site map, dilated by distance to
    its centroid."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in drawn.site[i].shape), indexing="ij"), -1)
    centres = np.stack([grid[drawn.site[i] == j].mean(0) for j in range(spec.sites)])
    return np.linalg.norm(grid[..., None, :] - centres, axis=-1).argmin(-1)


def test_signal_to_noise_and_ring_in_every_modality():
    spec = BINARY
    drawn = draw(spec)
    for m in range(2):
        ratios, rings = [], []
        for i in range(60):
            image = drawn.image[i, m]
            inside = dict.fromkeys((-1, 1), drawn.distance[i] < spec.radius - 1.5)
            shown = np.where(drawn.site[i] >= 0, drawn.evidence[i, m][drawn.site[i]], 0)
            ground = drawn.body[i] & (drawn.distance[i] > spec.radius + 5)
            level = image[ground].mean()
            residual = np.concatenate([image[inside[s] & (shown == s)] for s in (-1, 1)])
            if residual.size == 0 or not all((inside[s] & (shown == s)).any() for s in (-1, 1)):
                continue
            means = {s: image[inside[s] & (shown == s)].mean() for s in (-1, 1)}
            noise = np.mean([image[inside[s] & (shown == s)].std() for s in (-1, 1)])
            ratios.append(abs(means[1] - means[-1]) / 2 / noise)
            peak = np.abs(drawn.distance[i] - spec.radius - 2) < 0.4
            rings.append((image[peak].mean() - level) / abs(means[1] - means[-1]) * 2)
        assert len(ratios) > 10 and np.mean(ratios) >= 5
        assert np.all(np.sign(rings) == (1 if m == 0 else -1)) and 0.2 < np.abs(np.mean(rings)) < 0.6


def test_sites_stay_in_the_body_frame():
    """A positional base rate is learnable: a site's centre, in body coordinates, moves by jitter and rounding
    alone."""
    drawn = draw(BRAIN)
    body, site = drawn.body, drawn.site
    places = []
    for i in range(40):
        position = coordinates(body[i])[..., 1:]
        places.append([position[site[i] == j].mean(0) for j in range(BRAIN.sites)])
    assert np.abs(np.std(places, axis=0)).max() < 0.05


def test_a_number_gives_the_same_scene_in_any_company():
    alone = phantom_scene.scenes(TWO, [7], 3)
    together = draw(TWO)
    np.testing.assert_array_equal(alone.label[0], together.label[7])
    np.testing.assert_allclose(alone.image[0], together.image[7], rtol=1e-4, atol=1e-2)
    assert np.any(np.asarray(phantom_scene.scenes(TWO, [7], 4).image) != np.asarray(alone.image))


def test_volumes():
    made = phantom_scene.volumes(TWO, range(5), 3, chunk=4)
    drawn = draw(TWO)
    assert [v.name for v in made] == [f"PHANTOM_{i:05d}" for i in range(5)]
    for i, volume in enumerate(made):
        np.testing.assert_array_equal(volume.label, drawn.label[i])
        assert volume.image.shape == (2, 1, 32, 32) and volume.image.dtype == np.float32
        assert volume.coordinates.shape == (1, 32, 32, 3) and volume.label.dtype == np.int32
        inside = volume.image[:, volume.body]
        np.testing.assert_allclose(inside.mean(1), 0, atol=0.05)
        np.testing.assert_allclose(inside.std(1), 1, atol=0.1)
        assert not volume.image[:, ~volume.body].any()


def test_depth_gives_sections_of_balls():
    drawn = draw(SLAB, 3)
    assert drawn.image.shape == (3, 4, 12, 48, 48)
    sections = (drawn.site >= 0).sum((2, 3))
    assert (sections.max(1) > 2 * sections.min(1)).all()
    assert (drawn.body.sum((2, 3))[:, 0] < drawn.body.sum((2, 3))[:, 6]).all()
    assert drawn.body[drawn.site >= 0].all()


def test_export_round_trip(tmp_path):
    folder = phantom_scene.export(tmp_path, SLAB, 2, 3, ("T1", "T1ce", "FLAIR"), LABEL_MAP)
    drawn = draw(SLAB, 3)
    name = "PHANTOM_00002"
    assert folder == tmp_path / name and [p.name for p in tmp_path.iterdir()] == [name]
    endings = ("flair", "seg", "t1", "t1ce")
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}_{ending}.nii.gz" for ending in endings]
    scan = nibabel.load(folder / f"{name}_t1ce.nii.gz")
    assert scan.shape == (48, 48, 12) and nibabel.aff2axcodes(scan.affine) == ("R", "A", "S")
    np.testing.assert_allclose(scan.header.get_zooms(), 1)
    np.testing.assert_allclose(np.moveaxis(scan.get_fdata(), 2, 0), drawn.image[2, 1], rtol=1e-4, atol=0.05)
    seg = np.moveaxis(np.asarray(nibabel.load(folder / f"{name}_seg.nii.gz").dataobj), 2, 0)
    np.testing.assert_array_equal(seg, np.array([0, 1, 2, 4])[drawn.label[2]])
    assert phantom_scene.export(tmp_path, SLAB, 2, 3, ("T1",), LABEL_MAP) == folder  # replaced, not added to
    assert len(list(folder.iterdir())) == 2


def test_exported_case_reads_as_the_generated_volume(tmp_path):
    phantom_scene.export(tmp_path, SLAB, 2, 3, SLAB.modalities, LABEL_MAP)
    (case,) = layouts.find_cases("brats", tmp_path, SLAB.modalities)
    read = preprocess.read_volume(
        case,
        modalities=SLAB.modalities,
        reference="FLAIR",
        label_map=LABEL_MAP,
        classes=SLAB.classes,
    )
    made = phantom_scene.volumes(SLAB, [2], 3, chunk=1)[0]
    np.testing.assert_array_equal(read.label, made.label)
    assert np.mean(read.body != made.body) < 0.01
    both = read.body & made.body
    assert np.abs(read.image[:, both] - made.image[:, both]).mean() < 0.05


def test_mistakes_are_named(tmp_path):
    for key, change in (
        ("radius", {"radius": 12.0}),
        ("reliability", {"reliability": (0.9,)}),
        ("reliability", {"reliability": (0.9, 0.4)}),
        ("snr", {"snr": 2.0}),
        ("prior", {"prior": 1.0}),
        ("variant", {"variant": "heart"}),
        ("modalities", {"variant": "brain"}),
        ("prior", {"variant": "class"}),
        ("prior", {"prior": (0.3, 0.3)}),
        ("prior", {"variant": "class", "prior": (0.5, 0.5)}),
        ("correlated", {"correlated": ("A", "C", 0.7)}),
        ("correlated", {"correlated": ("A", "A", 0.7)}),
        ("correlated", {"correlated": ("A", "B", 0.7)}),
        ("correlated", {"correlated": ("A", "B", 0.6)}),
    ):
        with pytest.raises(UserError, match=f"data.phantom.{key}"):
            dataclasses.replace(phantom.Spec(), **change)
    with pytest.raises(UserError, match="no modality 'CT'"):
        phantom_scene.export(tmp_path, TWO, 0, 0, ("CT",), ((0, 0), (1, 1)))
    with pytest.raises(UserError, match="label_map"):
        phantom_scene.export(tmp_path, TWO, 0, 0, ("A",), ((0, 0),))


@pytest.mark.parametrize(
    "change",
    [
        {"size": (32, 32), "sites": 2, "radius": 3.5},
        {**dataclasses.asdict(BRAIN), "size": (64, 64), "depth": 4, "radius": 7.0, "jitter": 1.0},
        {**dataclasses.asdict(BRAIN), "depth": 64},
    ],
)
def test_useful_sizes_fit(change):
    phantom.Spec(**change)
