"""A change of one modality: it is where it should be, nowhere else, without a seam, and dose 0 is no change."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrust_jax.data import injection
from entrust_jax.data.body import coordinates
from entrust_jax.data.injection import Move
from entrust_jax.data.preprocess import Volume

SHAPE = (2, 48, 40)
NOISE = 0.1


def scan(seed=0, present=(True, True), centre=(14, 18), radius=5):
    """An even body on a ramp of intensity, with a lesion of another contrast in each of two modalities."""
    rng = np.random.default_rng(seed)
    _, h, w = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    body = np.hypot((h - 23.5) / 22, (w - 19.5) / 18) <= 1
    lesion = np.hypot(h - centre[0], w - centre[1]) <= radius
    ramp = 0.02 * h
    image = np.stack([ramp + 2.0 * lesion, -ramp - 1.0 * lesion]) + NOISE * rng.normal(size=(2, *SHAPE))
    image = image * body * np.reshape(present, (2, 1, 1, 1))
    return Volume(
        name="A", patient="A", number=1, image=image.astype(np.float32), present=np.array(present),
        label=lesion.astype(np.int32), body=body, coordinates=coordinates(body), spacing=(1.0, 1.0, 1.0),
        reference=None,
    )  # fmt: skip


def both(volume, slices=2):
    part, found = injection.prepared(volume, slices)
    assert [one.kind for one in found] == ["erase", "transplant"]
    return part, *found


moves = st.builds(Move, st.booleans(), st.integers(-6, 12), st.integers(-6, 6))


@given(moves, st.integers(0, 9), st.integers(0, 7))
@settings(max_examples=60)
def test_a_move_goes_where_it_says_and_back(move, h, w):
    values = np.zeros((10, 8))
    values[h, w] = 1.0
    there = injection.carried(values, move)
    at = (move.h - h if move.flip else h + move.h, w + move.w)
    if 0 <= at[0] < 10 and 0 <= at[1] < 8:
        assert there[at] == 1.0 and there.sum() == 1.0
        np.testing.assert_array_equal(injection.carried(there, injection.inverse(move)), values)
    else:
        assert there.sum() == 0.0


def test_an_erased_lesion_looks_like_what_is_around_it_in_every_modality():
    part, erase, _ = both(scan())
    lesion = part.label > 0
    ramp = 0.02 * np.arange(SHAPE[1])[None, :, None]
    for m, truth in enumerate((ramp, -ramp)):
        before = np.abs(part.image[m] - truth)[lesion].mean()
        after = (erase.changed[m] - truth)[lesion]
        assert before > 0.9
        assert abs(after.mean()) < 0.05
        assert 0.7 * NOISE < after.std() < 1.6 * NOISE  # the tissue's own noise, not a smooth patch


def test_a_transplanted_lesion_has_the_contrast_of_the_first():
    part, _, graft = both(scan())
    assert not np.any(graft.region & (part.label > 0))
    assert graft.region.sum() == np.sum(part.label > 0)
    for m, contrast in enumerate((2.0, -1.0)):
        change = (graft.changed - part.image)[m][graft.region].mean()
        assert change == pytest.approx(contrast, abs=0.1)


@pytest.mark.parametrize("which", [0, 1])
def test_nothing_is_changed_away_from_the_region(which):
    part, *found = both(scan())
    near = injection.grown(found[which].region, injection.MARGIN)
    np.testing.assert_array_equal(found[which].changed[:, ~near], part.image[:, ~near])
    assert np.abs(found[which].changed - part.image)[:, found[which].region].mean() > 0.5


def test_there_is_no_seam():
    """The steps across the rim of the changed part are those of the tissue itself; those of a pasted patch are not."""
    part, erase, _ = both(scan(), slices=1)
    region = injection.grown(erase.region, injection.MARGIN) & part.body
    rim = region[:, 1:] != region[:, :-1]

    def step(image):
        return np.abs(np.diff(image[0], axis=1))[rim].mean()

    pasted = np.where(region, part.image + 1.0, part.image)
    usual = np.abs(np.diff(part.image[0], axis=1))[~rim & part.body[:, 1:] & part.body[:, :-1]].mean()
    assert step(erase.changed) < 1.6 * usual
    assert step(pasted) > 4 * usual


def test_a_dose_is_a_share_and_none_is_no_change():
    part, erase, _ = both(scan())
    only = np.array([True, False])
    np.testing.assert_array_equal(injection.altered(part, erase, only, 0.0).image, part.image)
    half, whole = (injection.altered(part, erase, only, dose).image for dose in (0.5, 1.0))
    np.testing.assert_array_equal(whole[1], part.image[1])  # exactly one modality
    np.testing.assert_allclose(whole[0], erase.changed[0], atol=1e-6)
    np.testing.assert_allclose(half[0], (part.image[0] + erase.changed[0]) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="dose"):
        injection.altered(part, erase, only, 1.5)


def test_the_unrelated_texture_has_the_energy_of_the_change_and_no_brightness():
    part, erase, _ = both(scan())
    other = injection.unrelated(part, erase, 3)
    for m in range(2):
        change, texture = (one.changed[m] - part.image[m] for one in (erase, other))
        assert np.sum(texture**2) == pytest.approx(np.sum(change**2), rel=1e-3)
        assert abs(texture.sum()) < 0.05 * np.abs(texture).sum()
    assert np.all((other.changed == part.image) | np.any(erase.changed != part.image, axis=0))


def test_a_missing_modality_stays_missing():
    part, erase, graft = both(scan(present=(True, False)))
    assert not erase.changed[1].any() and not graft.changed[1].any()
    assert not injection.unrelated(part, erase, 0).changed[1].any()


def test_a_lesion_that_touches_the_rim_of_the_body_is_erased_without_the_dark_from_outside():
    part, erase, _ = both(scan(centre=(5, 19), radius=4))
    assert erase.region.any() and np.abs(erase.changed[0][erase.region]).max() < 0.1 + 5 * NOISE + 0.02 * 12
    assert not erase.changed[:, ~part.body].any()


def test_a_place_is_healthy_and_in_the_body():
    volume = scan()
    move = injection.find_move(volume, volume.label > 0)
    there = injection.carried(volume.label > 0, move)
    assert volume.body[there].all()
    assert not np.any(there & injection.grown(volume.label > 0, injection.APART))


def test_where_there_is_no_place_or_no_lesion_nothing_is_injected():
    volume = scan()
    everywhere = dataclasses.replace(volume, label=volume.body.astype(np.int32))
    none = dataclasses.replace(volume, label=np.zeros(SHAPE, np.int32))
    unlabelled = dataclasses.replace(volume, label=None)
    for one in (everywhere, none, unlabelled):
        assert injection.prepared(one, 2)[1] == []


def test_the_slices_with_the_largest_lesion_are_cut_out():
    volume = scan()
    label = volume.label.copy()
    label[0] = 0
    part, _ = injection.prepared(dataclasses.replace(volume, label=label), 1)
    assert part.image.shape == (2, 1, *SHAPE[1:])
    np.testing.assert_array_equal(part.image, volume.image[:, 1:])
    np.testing.assert_array_equal(part.coordinates, volume.coordinates[1:])
