"""The delivered mask against brute force, its predicted Dice against the truth, volumes by hand."""

import numpy as np
import pytest

from entrust_jax.trustmap.case import THRESHOLDS, choose_threshold, dice_bayes, threshold_action, trust, volumes


def dice(a: np.ndarray, b: np.ndarray, classes: int) -> list[float]:
    result = []
    for k in range(1, classes):
        x, y = a == k, b == k
        result.append(1.0 if not (x.any() or y.any()) else 2.0 * (x & y).sum() / (x.sum() + y.sum()))
    return result


def hypotheses(seed: int, count: int, classes: int, shape=(2, 5, 6)):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size=(count, *shape)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.4] = 0
    mean = np.stack([(labels == k).mean(0) for k in range(classes)], -1).astype(np.float32)
    return 0.9 * mean + 0.1 / classes, labels


def test_threshold_action_by_hand():
    p = np.array([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.9, 0.05, 0.05]])
    assert threshold_action(p, 0.35).tolist() == [1, 2, 0]
    assert threshold_action(p, 0.5).tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("classes", [2, 3])
def test_dice_bayes_is_the_brute_force_choice(count: int, classes: int):
    mean, labels = hypotheses(10 * count + classes, count, classes)
    label, info = dice_bayes(mean, labels)
    best, chosen, held = -1.0, None, None
    candidates = [(threshold_action(mean, tau), None) for tau in THRESHOLDS] + [(labels[n], n) for n in range(count)]
    for candidate, own in candidates:
        choosing = [dice(candidate, labels[n], classes) for n in range(0, count, 2) if n != own]
        judging = [dice(candidate, labels[n], classes) for n in range(1, count, 2) if n != own]
        if choosing and judging and np.mean(choosing) > best + 1e-9:
            best, chosen, held = np.mean(choosing), candidate, np.mean(judging, axis=0)
    np.testing.assert_array_equal(label, chosen)
    assert info["utility"] == pytest.approx(best) and info["predicted_dice"] == pytest.approx(np.mean(held))
    np.testing.assert_allclose(info["predicted_dice_by_class"], held)


def test_predicted_dice_is_honest():
    """Truth and hypotheses from one law (a disc of random size, maybe absent): the predicted Dice is the true
    one on average, and the choice is no worse than the mask of p > .5."""
    rng = np.random.default_rng(0)
    grid = np.hypot(*np.meshgrid(np.arange(24) - 12, np.arange(24) - 12))[None]

    def draw(place: float) -> np.ndarray:
        return ((rng.random() < place) * (grid < rng.uniform(3, 9))).astype(np.uint8)

    predicted, true, naive = [], [], []
    for _ in range(200):
        place = rng.choice([0.45, 0.8, 1.0])
        labels = np.stack([draw(place) for _ in range(16)])
        mean = np.stack([1 - labels.mean(0), labels.mean(0)], -1)
        label, info = dice_bayes(mean, labels)
        truth = draw(place)
        predicted.append(info["predicted_dice"])
        true.append(dice(label, truth, 2)[0])
        naive.append(dice(threshold_action(mean, 0.5), truth, 2)[0])
    assert np.mean(predicted) == pytest.approx(np.mean(true), abs=3 * np.std(true) / np.sqrt(200))
    assert np.mean(true) > np.mean(naive) - 0.02


def test_empty_and_single_hypotheses():
    empty = np.zeros((4, 1, 5, 5), np.uint8)
    mean = np.stack([np.full((1, 5, 5), 0.99), np.full((1, 5, 5), 0.01)], -1)
    label, info = dice_bayes(mean, empty)
    assert not label.any() and info["predicted_dice"] == 1.0 and info["empty_by_class"] == [1.0]
    label, info = dice_bayes(mean[..., ::-1], empty[:1])
    assert label.all() and info["predicted_dice"] is None


def test_global_threshold():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.0, 0.4, (1, 30, 30))
    truth = (p > 0.25).astype(np.int32)
    cases = [(np.stack([1 - p, p], -1), truth)]
    tau, score = choose_threshold(cases)
    assert tau == pytest.approx(0.25) and score.max() == pytest.approx(1.0)
    # ignored voxels do not count
    hidden = np.where(p < 0.3, truth, -1)
    assert choose_threshold([(cases[0][0], hidden)])[1].max() == pytest.approx(1.0)
    # all thresholds equal: the neutral one
    assert choose_threshold([(np.stack([1 - 0 * p, 0 * p], -1), 0 * truth)])[0] == 0.5
    # several raters count as one case together
    other = (p > 0.1).astype(np.int32)
    rated = choose_threshold([(cases[0][0], np.concatenate([truth, other])[:, None])])[1]
    each = [choose_threshold([(cases[0][0], one)])[1] for one in (truth, other)]
    np.testing.assert_allclose(rated, np.mean(each, axis=0))
    with pytest.raises(ValueError, match="validation case"):
        choose_threshold([])


def test_volumes_by_hand():
    labels = np.zeros((3, 1, 2, 5), np.uint8)
    labels[0, 0, 0, :2], labels[1, 0, 0, :4], labels[2, 0, 1, :3] = 1, 1, 2
    result = volumes(labels, {"whole": (1, 2), "core": (2,)}, voxel_ml=0.5)
    assert result["whole"]["volume_ml"] == pytest.approx(1.5)
    assert result["whole"]["interval"] == pytest.approx(np.percentile([1.0, 2.0, 1.5], [5, 95]))
    assert result["core"]["volume_ml"] == pytest.approx(0.5)
    assert volumes(labels[:1], {"whole": (1,)}, 1.0)["whole"] == {"volume_ml": 2.0, "interval": None}


def test_trust_by_hand():
    error = np.full((1, 20, 20), 0.01, np.float32)
    p = np.zeros((1, 20, 20, 2), np.float32)
    p[..., 0] = 1.0
    body, label = np.ones((1, 20, 20), bool), np.zeros((1, 20, 20), np.uint8)
    calm = trust(error, p, label, body, 0.5, 0.8)
    assert calm["mean_error"] == pytest.approx(0.01)  # foreground is likely nowhere: the whole body
    assert calm["score"] == 0 and calm["nothing_found"] and calm["predicted_dice"] == 0.8
    assert calm["largest_doubtful_ml"] == 0 and calm["contested_ml"] is None and calm["gap"] is None
    p[0, 10, 10] = (0.5, 0.5)  # the place to look at: 11 x 11 voxels around this one
    error[0, 10, 9:12], error[0, 0, 0], error[0, 12, 10] = 0.6, 1.0, 0.5
    conflict = np.where(error > 0.55, 0.3, 0.1).astype(np.float32)
    label[0, 10, 10] = 1
    found = trust(error, p, label, body, 0.5, None, conflict, 2 * error)
    mean = (117 * 0.01 + 3 * 0.6 + 0.5) / 121
    assert found["mean_error"] == pytest.approx(mean) and found["gap"] == pytest.approx(2 * mean)
    assert found["score"] == pytest.approx(1 - mean) and not found["nothing_found"]
    assert trust(error, p, label, body, 0.5, 0.8)["score"] == 0.8
    assert found["largest_doubtful_ml"] == 1.5 and found["contested_ml"] == 2.0


def test_a_lesion_that_all_hypotheses_miss_is_not_the_most_trusted():
    mean = np.full((2, 8, 8, 2), (0.999, 0.001), np.float32)
    label, decision = dice_bayes(mean, np.zeros((6, 2, 8, 8), np.uint8))
    assert decision["predicted_dice"] == 1  # empty with empty
    error, body = np.full(label.shape, 0.001, np.float32), np.ones(label.shape, bool)
    found = trust(error, mean, label, body, 1.0, decision["predicted_dice"])
    assert found["score"] == 0 and found["nothing_found"] and found["predicted_dice"] == 1
