"""The semi-synthetic law: cases show what they were drawn to show, and Bayes' rule holds of what was drawn."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.data import phantom, semisynthetic
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume

RHO = (0.9, 0.7)
SHAPE = (2, 40, 36)


def scan(number=0, present=(True, True)):
    rng = np.random.default_rng(number)
    _, h, w = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    body = np.hypot((h - 19.5) / 19, (w - 17.5) / 17) <= 1
    lesion = np.hypot(h - 12, w - 12) <= 4
    image = (np.stack([2.0 * lesion, -2.0 * lesion]) + 0.1 * rng.normal(size=(2, *SHAPE))) * body
    image = image * np.reshape(present, (2, 1, 1, 1))
    return Volume(
        name=f"P{number}", patient=f"P{number}", number=number, image=image.astype(np.float32),
        present=np.array(present), label=2 * lesion.astype(np.int32), body=body, coordinates=coordinates(body),
        spacing=(1.0, 1.0, 1.0), reference=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def candidate():
    return semisynthetic.candidate(scan())


def test_the_posterior_is_that_of_the_phantom():
    spec = phantom.Spec(
        size=(32, 32), depth=1, modalities=("A", "B"), sites=2, prior=0.5, reliability=RHO, ignorance=(0.1, 0.1),
        radius=4.0, jitter=0.5, variant="binary",
    )  # fmt: skip
    said = np.array([[1, 1, -1, 0, 0], [1, -1, 1, 1, 0]])
    expected = phantom.posterior(jnp.asarray(said), jnp.ones(2, bool), spec)
    np.testing.assert_allclose(semisynthetic.posterior(said.T, RHO), expected, atol=1e-6)


def test_every_modality_shows_what_was_drawn_for_it(candidate):
    seen = set()
    for seed in range(24):
        made, sites = semisynthetic.draw(candidate, RHO, seed)
        for site in sites:
            for m, sign in enumerate((1, -1)):
                level = sign * made.image[m][site.mask].mean()
                assert level == pytest.approx(2.0 if site.evidence[m] > 0 else 0.0, abs=0.2)
            assert np.all(made.label[site.mask] == (2 if site.truth else 0))
            seen.add((site.place, *site.evidence.tolist(), site.truth))
        lesion = sites[0].mask | sites[1].mask
        assert not made.label[~lesion].any() and not np.any(sites[0].mask & sites[1].mask)
    assert len(seen) > 10


def test_the_truth_is_as_frequent_as_the_posterior_says(candidate):
    """What Bayes' rule says of a site is how often it holds a lesion, over many draws; a wrong law is found out."""
    found = [site for seed in range(1500) for site in semisynthetic.draw(small(candidate), RHO, seed)[1]]
    for said in ((1, 1), (1, -1), (-1, 1)):
        own = [site for site in found if tuple(site.evidence.tolist()) == said]
        share = np.mean([site.truth for site in own])
        limit = 4 * np.sqrt(0.25 / len(own))
        assert share == pytest.approx(own[0].posterior, abs=limit)
    assert semisynthetic.posterior(np.array([1, -1]), (0.7, 0.9)) == pytest.approx(0.206, abs=1e-3)  # not the law here


def small(candidate):
    """The same law on a few voxels: draws that need no image."""
    volume = candidate.volume
    part = (slice(None), slice(0, 1), slice(8, 16), slice(8, 16))
    return candidate._replace(
        volume=dataclasses.replace(
            volume,
            image=volume.image[part],
            label=volume.label[part[1:]],
            body=volume.body[part[1:]],
            coordinates=volume.coordinates[part[1:]],
        ),
        other=candidate.other[part[1:]],
        hidden=candidate.hidden[part],
        shown=candidate.shown[part],
    )


def test_a_missing_modality_shows_nothing():
    candidate = semisynthetic.candidate(scan(present=(True, False)))
    made, sites = semisynthetic.draw(candidate, RHO, 1)
    assert all(site.evidence[1] == 0 for site in sites) and not made.image[1].any()
    assert sites[0].posterior == pytest.approx(0.9 if sites[0].evidence[0] > 0 else 0.1)


def test_a_scan_without_a_lesion_or_a_label_gives_no_case():
    volume = scan()
    assert semisynthetic.candidate(dataclasses.replace(volume, label=None)) is None
    assert semisynthetic.candidate(dataclasses.replace(volume, label=0 * volume.label)) is None


def test_sites_are_sorted_by_what_is_said_of_them():
    assert semisynthetic.kind(np.array([1, 0, 1])) == "agree"
    assert semisynthetic.kind(np.array([1, 0, -1])) == "conflict"
    assert semisynthetic.kind(np.array([-1, 0, -1])) == "unseen"


def test_a_lesion_that_fills_the_body_has_room_in_some_slices():
    """Of three slices the lesion fills the first; the second and the third alone can be used."""
    volume = scan()
    parts = {name: np.concatenate([x, x[..., :1, :, :]], axis=-3)
             for name, x in (("image", volume.image), ("label", volume.label), ("body", volume.body))}  # fmt: skip
    parts["label"][0] = parts["body"][0]
    full = dataclasses.replace(volume, **parts, coordinates=coordinates(parts["body"]))
    assert semisynthetic.candidate(full) is None
    found = semisynthetic.candidate(full, 2)
    assert found is not None and found.start == 1 and found.volume.body.shape == SHAPE
    np.testing.assert_array_equal(found.volume.label, full.label[1:])
