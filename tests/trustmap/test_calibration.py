"""The ladder repairs a known over-confidence, starts at the identity, cannot raise the cross-fitted NLL."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.special import log_softmax, softmax

from entrust_jax.trustmap import calibration as cal
from entrust_jax.trustmap import pixels, rungs

SIZE, STEPS = 24, 400


def make(seed: int, patients: int, classes: int, power: float, slices: int = 3):
    """Labels drawn from a known p; the model reports p^power / Z. Returns the set and the true p."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(patients * slices, SIZE, SIZE, classes))
    z = 4.0 * np.stack([gaussian_filter(plane, (2, 2, 0)) for plane in z]) / 0.14
    z[..., 0] += 1.0
    p = softmax(z / 4.0, axis=-1)
    label = (p.cumsum(-1) < rng.random(p.shape[:-1])[..., None]).sum(-1).clip(0, classes - 1)
    reported = softmax(power * np.log(p), axis=-1)
    delivered = reported.argmax(-1).astype(np.uint8)
    maps = {"one_step": reported, "mean": reported, "entropy": -(reported * np.log(reported)).sum(-1)}
    columns, _ = pixels.features(maps | {"border": pixels.signed_distance(delivered)}, np.array([True, True]))
    log_p = pixels.log_probability(reported)
    data = cal.CalibrationSet(
        columns,
        log_p,
        log_p,
        label.astype(np.int32),
        delivered.astype(np.int32),
        np.ones(label.shape, np.float32),
        np.repeat(np.arange(patients), slices),
    )
    return data, p


def nll(data: cal.CalibrationSet, probability: np.ndarray) -> float:
    return float(np.mean(list(cal.patient_nll(data, probability).values())))


def run(name: str, params: dict, data: cal.CalibrationSet):
    return rungs.apply(name, params, data.features, data.one_step, data.mean, data.delivered)


@pytest.fixture(scope="module")
def binary():
    return make(0, 10, 2, 2.0)


@pytest.fixture(scope="module")
def head(binary):
    return cal.fit("head", binary[0], jax.random.key(0), steps=STEPS)


@pytest.mark.parametrize("name", [n for n in rungs.RUNGS if n != "isotonic"])
def test_every_rung_starts_at_the_identity(name: str, binary):
    data, _ = binary
    rng = np.random.default_rng(1)
    mean = log_softmax(data.mean + rng.normal(size=data.mean.shape), axis=-1).astype(np.float32)
    data = dataclasses.replace(data, mean=mean)
    p, e = run(name, cal.fit(name, data, jax.random.key(0), steps=0), data)
    share = 1 / (1 + np.exp(-2.0))
    expected = softmax(share * data.one_step + (1 - share) * mean, axis=-1)
    np.testing.assert_allclose(p, expected, atol=1e-5)
    right = np.take_along_axis(expected, data.delivered[..., None], -1)[..., 0]
    np.testing.assert_allclose(e, 1 - right, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in rungs.RUNGS if n != "identity"])
def test_overconfidence_is_repaired(name: str, binary):
    data, truth = binary
    params = cal.fit(name, data, jax.random.key(0), steps=STEPS)
    p, e = run(name, params, data)
    best, before = nll(data, truth), nll(data, run("identity", {}, data)[0])
    assert before > best + 0.03
    assert nll(data, p) < best + 0.15 * (before - best)
    assert np.abs(p - truth).mean() < 0.04
    np.testing.assert_allclose(p.sum(-1), 1.0, atol=1e-5)
    wrong = 1 - np.take_along_axis(truth, data.delivered[..., None], -1)[..., 0]
    assert np.abs(e - wrong).mean() < 0.05
    if name == "temperature":
        assert np.exp(params["log_temperature"]) == pytest.approx(2.0, abs=0.15)


def test_windows_of_the_fit_are_the_convolution_of_apply(binary, head):
    """Fitted on gathered 3x3 windows, applied as a convolution: the same numbers, borders included."""
    data, params = binary[0], head
    pixels = cal._gather(data, np.random.default_rng(0))
    p, e = run("head", params, data)
    params = jax.tree.map(jnp.asarray, params)
    z = rungs.standardise(params, jnp.asarray(pixels.windows)) * pixels.inside[..., None]
    hidden = rungs.window_convolution(params["kernel0"])(z)
    given = [jnp.asarray(a) for a in (pixels.one_step, pixels.mean, pixels.delivered)]
    log_p, error, _ = rungs.head(params, hidden, *given)
    assert len(log_p) == p[..., 0].size
    np.testing.assert_allclose(np.exp(log_p), p.reshape(-1, 2), atol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(error), e.ravel(), atol=1e-5)
    assert sum(v.size for k, v in params.items() if k not in ("center", "scale")) < 6000


@pytest.mark.parametrize(("power", "classes"), [(1.0, 2), (2.0, 4)])
def test_selection_never_raises_the_crossfitted_nll(power: float, classes: int):
    data, _ = make(3, 8, classes, power, slices=1)
    result = cal.select(data, jax.random.key(1), steps=40, folds=2)
    table = result["table"]
    assert set(table) == set(rungs.RUNGS) and result["note"] == "" and result["patients"] == 8
    assert table[result["chosen"]]["nll"] <= table["identity"]["nll"]
    if power > 1:
        assert table[result["chosen"]]["nll"] < table["identity"]["nll"] - 0.01
    if result["chosen"] == "head":
        assert table["head"]["difference"] < -2 * table["head"]["se"]
    p, e = run(result["chosen"], result["params"], data)
    assert p.shape == (*data.label.shape, classes) and (e >= 0).all() and (e <= 1).all()


def test_head_is_dropped_unless_it_is_clearly_better(monkeypatch, binary):
    """A head that is a little better on average, but not on every patient, must not be chosen."""
    data, _ = binary
    gain = {}

    def fake_nll(held, probability):
        assert probability is not None
        return {int(p): gain["now"](int(p)) for p in np.unique(held.patient)}

    rung = []
    monkeypatch.setattr(cal, "_fit", lambda name, *_: rung.append(name) or {})
    monkeypatch.setattr(rungs, "apply", lambda name, *_: (np.zeros(1), None))
    monkeypatch.setattr(cal, "patient_nll", fake_nll)

    def costs(spread: float):
        table = {"temperature": 0.5, "head": 0.45}
        return lambda p: table.get(rung[-1], 0.6) + (spread * (-1) ** p if rung[-1] == "head" else 0.0)

    gain["now"] = costs(0.01)
    assert cal.select(data, jax.random.key(0))["chosen"] == "head"
    gain["now"] = costs(0.3)
    assert cal.select(data, jax.random.key(0))["chosen"] == "temperature"


def test_few_patients_get_temperature_or_identity_and_are_told():
    data, _ = make(5, 4, 2, 2.0)
    result = cal.select(data, jax.random.key(0))
    assert set(result["table"]) == {"identity", "temperature"} and result["chosen"] == "temperature"
    assert "4 calibration patients" in result["note"]
    alone = cal.select(make(5, 1, 2, 2.0)[0], jax.random.key(0))
    assert alone["chosen"] == "identity" and "1 calibration patient" in alone["note"]


@pytest.mark.parametrize("name", rungs.RUNGS)
def test_a_class_that_never_occurs_stays_finite(name: str, binary):
    data, _ = binary
    data = dataclasses.replace(data, label=np.zeros_like(data.label))
    p, e = run(name, cal.fit(name, data, jax.random.key(0), steps=STEPS), data)
    assert np.isfinite(p).all() and np.isfinite(e).all()
    if name != "identity":
        assert nll(data, p) < nll(data, run("identity", {}, data)[0])


def test_a_feature_that_never_varied_cannot_act_later(binary, head):
    data, params = binary[0], head
    changed = data.features.copy()
    assert (changed[..., -1] == 1).all()
    changed[..., -1] = 0.0
    after = run("head", params, dataclasses.replace(data, features=changed))[0]
    np.testing.assert_array_equal(run("head", params, data)[0], after)


def test_errors(binary):
    data, _ = binary
    with pytest.raises(ValueError, match="unknown calibrator"):
        cal.fit("magic", data, jax.random.key(0))
    with pytest.raises(ValueError, match="no calibration pixel"):
        cal.fit("temperature", dataclasses.replace(data, weight=0 * data.weight), jax.random.key(0))
    params = cal.fit("head", data, jax.random.key(0), steps=0)
    with pytest.raises(ValueError, match="fitted on"):
        run("head", params, dataclasses.replace(data, features=data.features[..., 1:]))
