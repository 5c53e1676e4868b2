"""What the calibrators are fitted on: scans of any size, each rater with his share."""

import dataclasses

import numpy as np

from entrust_jax.data import preprocess
from entrust_jax.training import calibration_data
from entrust_jax.trustmap import calibration, pixels


def test_calibration_joins_scans_of_different_sizes():
    def part(h, w, patient):
        rng = np.random.default_rng(patient)
        log_p = np.log(np.full((2, h, w, 3), 1 / 3, np.float32))
        label = rng.integers(0, 3, (2, h, w))
        return calibration.CalibrationSet(
            features=rng.normal(size=(2, h, w, 4)).astype(np.float32), one_step=log_p, mean=log_p, label=label,
            delivered=label, weight=np.ones((2, h, w), np.float32), patient=np.full(2, patient),
        )  # fmt: skip

    joined = calibration_data.join([part(5, 7, 0), part(6, 4, 1)])
    assert joined.features.shape == (4, 6, 7, 4) and joined.label.shape == joined.weight.shape == (4, 6, 7)
    assert joined.weight.sum() == 2 * (5 * 7 + 6 * 4) and np.all((joined.weight > 0) == (joined.label >= 0))
    assert list(joined.patient) == [0, 0, 1, 1]


def test_each_rater_calibrates_with_his_share():
    rng = np.random.default_rng(0)
    d, h, w = 3, 8, 8
    labels = rng.integers(0, 2, (2, d, h, w)).astype(np.int32)
    zero = np.zeros((d, h, w), np.float32)
    p = np.full((d, h, w, 2), 0.5, np.float32)
    raw = dict.fromkeys(("entropy", "divergence", "within", "disagreement", "gap"), zero)
    raw |= {"one_step": p, "mean": p, "label": labels[0].astype(np.uint8), "kept": np.array([0, 2])}
    raw["border"] = pixels.signed_distance(raw["label"])
    raw = {name: value if name == "kept" else value[[0, 2]] for name, value in raw.items()}
    raw["slice_weight"] = np.array([1.5, 1.5], np.float32)
    plain = preprocess.Volume(
        name="a", patient="a", number=1, image=zero[None], present=np.array([True]), label=labels[0],
        body=np.ones((d, h, w), bool), coordinates=np.zeros((d, h, w, 3), np.float32), spacing=(1.0, 1.0, 1.0),
        reference=None,
    )  # fmt: skip
    one = calibration_data.calibration_slices(raw, plain, 4, 0)
    two = calibration_data.calibration_slices(raw, dataclasses.replace(plain, raters=labels), 4, 0)
    np.testing.assert_array_equal(one.label, labels[0][[0, 2]])
    np.testing.assert_array_equal(two.label, np.concatenate(labels[:, [0, 2]]))
    np.testing.assert_array_equal(two.weight, np.concatenate([one.weight / 2] * 2))
    np.testing.assert_array_equal(two.delivered, np.concatenate([one.delivered] * 2))
    assert two.patient.tolist() == [4] * 4 and two.features.shape[0] == 4
