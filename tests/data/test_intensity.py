"""How intensities are read: scale-free where they have no unit, by their rule where they have one."""

import numpy as np
import pytest

from entrust_jax.data import intensity as intensities
from entrust_jax.errors import UserError


def test_normalise_is_affine_invariant_monotone_and_unsaturated():
    rng = np.random.default_rng(0)
    image = rng.normal(100, 10, (1, 40, 40)).astype(np.float32)
    image[0, 0, :5] = [200, 400, 800, 1600, 3200]
    body = np.ones((40, 40), bool)
    z = intensities.normalise(image, np.array([True]), body)
    assert (np.diff(z[0, 0, :5]) > 0).all() and z.max() < 12
    np.testing.assert_allclose(z, intensities.normalise(3 * image - 7, np.array([True]), body), atol=2e-3)
    assert not intensities.normalise(image, np.array([False]), body).any()
    flat = intensities.normalise(np.full_like(image, 4), np.array([True]), body)
    assert not flat.any()


def test_intensities_with_a_unit_are_read_by_their_rule():
    values = np.array([[-1000.0, -160, 40, 240, 900], [0, 2.5, 10, 25, 50]], np.float32)
    both, body = np.array([True, True]), np.ones(5, bool)
    rules = intensities.rules_of({"CT": ("window", -160, 240), "PET": ["scale", 2.5]}, ("CT", "PET"))
    z = intensities.normalise(values, both, body, rules)
    np.testing.assert_allclose(z[0], [-2, -2, 0, 2, 2], atol=1e-6)
    np.testing.assert_allclose(z[1, :3], [0, 1, 4], atol=1e-6)
    assert z[1, 2] < z[1, 3] < z[1, 4] < 10  # hot, and still in order
    # A value means the same whatever else the patient holds; a z-score does not.
    np.testing.assert_array_equal(intensities.normalise(values[:, :3], both, body[:3], rules), z[:, :3])
    mixed = intensities.normalise(values, both, body, (None, rules[1]))
    assert abs(mixed[0].mean()) < 0.01 and np.array_equal(mixed[1], z[1])


def test_what_is_stored_is_read_as_what_it_was():
    rng = np.random.default_rng(0)
    body = np.hypot(*np.mgrid[-1:1:40j, -1:1:40j]) < 0.9
    rules = (None, ("window", -160.0, 240.0), ("scale", 2.5))
    raw = np.stack([rng.normal(80, 20, body.shape), rng.normal(20, 150, body.shape), rng.gamma(1, 8, body.shape)])
    both = np.ones(3, bool)
    image = intensities.normalise(raw, both, body, rules)
    assert image[2].max() > 4.5  # beyond where growth slows down
    stored = intensities.stored(image, body, rules)
    again = intensities.normalise(stored, both, body, rules)
    np.testing.assert_allclose(again[1:], image[1:], atol=1e-5)
    np.testing.assert_allclose(again[0], image[0], atol=0.03)  # whole numbers, and moments of its own
    np.testing.assert_allclose(stored[1][body], np.clip(raw[1][body], -160, 240), atol=1e-3)
    np.testing.assert_allclose(stored[2][body], raw[2][body], rtol=1e-4, atol=1e-5)
    assert not stored[[0, 2]][:, ~body].any() and set(stored[1][~body]) == {-1000.0}
    assert stored[0][body].min() >= 1


@pytest.mark.parametrize(
    ("intensity", "message"),
    [
        ({"MR": ("scale", 1)}, r"config\.data\.intensity: there is no modality MR; there are CT, PET"),
        ({"CT": ("window", 240, -160)}, r"config\.data\.intensity\.CT is \('window', 240, -160\); give"),
        ({"CT": ("window", 0)}, "give .*window"),
        ({"CT": ("zscore",)}, "or leave it out"),
        ({"PET": ("scale", 0)}, "PET is"),
        ({"PET": ("scale", float("nan"))}, "PET is"),
        ({"PET": ("scale", "SUV")}, "PET is"),
        ({"PET": "scale"}, "PET is"),
        ({"PET": ()}, "PET is"),
        ({"PET": ([1], 2)}, "PET is"),
        ({"PET": ("scale", True)}, "PET is"),
    ],
)
def test_a_rule_that_is_none_is_named(intensity, message):
    with pytest.raises(UserError, match=message):
        intensities.rules_of(intensity, ("CT", "PET"))
