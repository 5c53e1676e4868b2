"""Probabilities that hold: a ladder of calibrators (`trustmap.rungs`), fitted on patients that the model has not seen
and chosen by cross-fitting.
"""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from entrust_jax.trustmap import rungs
from entrust_jax.trustmap.pixels import FLOOR
from entrust_jax.trustmap.rungs import RUNGS, Params

SMALL_LADDER = ("identity", "temperature")
MINIMUM_PATIENTS = 8
PIXELS = 2**16
BATCH = 2**13
# the decay pulls the networks to the identity: tens of patients do not pay for thousands of weights
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1.0


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """n slices of calibration patients; for a method without hypotheses one_step and mean are equal."""

    features: Float[np.ndarray, "n h w f"]
    one_step: Float[np.ndarray, "n h w k"]  # log p_1
    mean: Float[np.ndarray, "n h w k"]  # log pbar
    label: Integer[np.ndarray, "n h w"]  # -1 = ignored
    delivered: Integer[np.ndarray, "n h w"]  # yhat, the mask that is delivered
    weight: Float[np.ndarray, "n h w"]  # 0 = not used, else 1 / probability of having been sampled
    patient: Integer[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """Sampled pixels with the 3x3 windows that the networks see: the only spatial operation of any rung."""

    windows: np.ndarray  # [p 9 f], zero outside the slice
    base_windows: np.ndarray  # [p 9 k+1]
    inside: np.ndarray  # [p 9]
    one_step: np.ndarray
    mean: np.ndarray
    label: np.ndarray
    delivered: np.ndarray
    weight: np.ndarray
    patient: np.ndarray


def _windows(image: np.ndarray, where: tuple[np.ndarray, ...]) -> np.ndarray:
    n, row, column = where
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return np.stack([padded[n, row + i, column + j] for i in range(3) for j in range(3)], axis=1)


def _gather(data: CalibrationSet, rng: np.random.Generator) -> _Pixels:
    """At most PIXELS of the pixels with weight, drawn uniformly; thinning leaves the weights' ratios
    unbiased.
    """
    where = np.nonzero((data.weight > 0) & (data.label >= 0))
    if not len(where[0]):
        raise ValueError("no calibration pixel: every weight is zero or every label ignored")
    if len(where[0]) > PIXELS:
        keep = np.sort(rng.choice(len(where[0]), PIXELS, replace=False))
        where = tuple(axis[keep] for axis in where)
    local = np.asarray(rungs.local_inputs(rungs.start(jnp.asarray(data.one_step), jnp.asarray(data.mean))))
    return _Pixels(
        windows=_windows(data.features, where).astype(np.float32),
        base_windows=_windows(local, where).astype(np.float32),
        inside=_windows(np.ones((*data.label.shape, 1), np.float32), where)[..., 0],
        one_step=data.one_step[where].astype(np.float32),
        mean=data.mean[where].astype(np.float32),
        label=data.label[where].astype(np.int32),
        delivered=data.delivered[where].astype(np.int32),
        weight=data.weight[where].astype(np.float64),
        patient=data.patient[where[0]],
    )


def _patient_weights(pixels: _Pixels, patients: np.ndarray) -> np.ndarray:
    """Weights that sum to 1, the same share for each of the given patients and 0 for the others."""
    weight = np.zeros(len(pixels.weight))
    for patient in patients:
        own = pixels.patient == patient
        total = pixels.weight[own].sum()
        if total > 0:
            weight[own] = pixels.weight[own] / total
    return (weight / max(weight.sum(), 1e-300)).astype(np.float32)


def _penalty(name: str, params: dict) -> Array:
    """A pull towards the identity, which keeps the bias of a class that never occurs finite."""
    if name == "temperature":
        return 1e-6 * params["log_temperature"] ** 2
    if name == "vector":
        return 1e-4 * (jnp.sum((params["scale"] - 1) ** 2) + jnp.sum(params["bias"] ** 2))
    return 1e-4 * (jnp.sum((params["matrix"] - jnp.eye(len(params["bias"]))) ** 2) + jnp.sum(params["bias"] ** 2))


@functools.partial(jax.jit, static_argnames="name")
def _affine_loss(name: str, flat: Array, base: Array, label: Array, weight: Array) -> tuple[Array, Array]:
    """Penalised NLL and its gradient at the parameters that `flat` [parameters] lists."""
    unflatten = jax.flatten_util.ravel_pytree(rungs.initial(name, base.shape[-1], 0, jax.random.key(0)))[1]

    def loss(x: Array) -> Array:
        params = unflatten(x)
        return -jnp.sum(weight * rungs.pick(rungs.affine(name, params, base), label)) + _penalty(name, params)

    return jax.value_and_grad(loss)(flat)


def _fit_affine(name: str, pixels: _Pixels, weight: np.ndarray, key: PRNGKeyArray, steps: int) -> Params:
    initial = rungs.initial(name, pixels.one_step.shape[-1], 0, key)
    flat, unflatten = jax.flatten_util.ravel_pytree(initial)
    base = rungs.start(jnp.asarray(pixels.one_step), jnp.asarray(pixels.mean))
    label, weight_ = jnp.asarray(pixels.label), jnp.asarray(weight)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = _affine_loss(name, jnp.asarray(x, jnp.float32), base, label, weight_)
        return float(value), np.asarray(grad, np.float64)

    x = np.asarray(flat, np.float64)
    if steps:
        options = {"maxiter": min(steps, 200)}
        x = scipy.optimize.minimize(objective, x, jac=True, method="L-BFGS-B", options=options).x
    return {k: np.asarray(v, np.float32) for k, v in unflatten(jnp.asarray(x, jnp.float32)).items()}


def _fit_isotonic(pixels: _Pixels, weight: np.ndarray) -> Params:
    """Pool-adjacent-violators per class; a block of n pixels is smoothed by half a hit and half a miss."""
    log_p = np.asarray(rungs.start(jnp.asarray(pixels.one_step), jnp.asarray(pixels.mean)), np.float64)
    used = weight > 0
    log_p, label, weight = log_p[used], pixels.label[used], weight[used].astype(np.float64)
    values = []
    for k in range(log_p.shape[-1]):
        logit = log_p[:, k] - np.log(np.maximum(-np.expm1(log_p[:, k]), 1e-30))
        order = np.argsort(logit, kind="stable")
        # equal probabilities are one point, whatever the order of their labels
        x, start = np.unique(logit[order], return_index=True)
        w = np.add.reduceat(weight[order], start)
        hit = np.add.reduceat(weight[order] * (label[order] == k), start) / w
        size = np.diff(np.append(start, len(order)))
        fitted = scipy.optimize.isotonic_regression(hit, weights=w)
        lengths = np.diff(fitted.blocks)
        n = np.add.reduceat(size, fitted.blocks[:-1])
        smooth = (fitted.x[fitted.blocks[:-1]] * n + 0.5) / (n + 1)
        y = np.repeat(np.maximum.accumulate(smooth), lengths)
        values.append(np.interp(rungs.ISOTONIC_GRID, x, y))
    return {"value": np.clip(np.stack(values), FLOOR, 1 - FLOOR).astype(np.float32)}


@functools.partial(jax.jit, static_argnames=("name", "steps"))
def _fit_network(name: str, params: dict, fixed: dict, pixels: dict, key: PRNGKeyArray, steps: int) -> dict:
    """AdamW on random batches of the sampled pixels. Losses: the local temperature's NLL; for the head
    NLL + .5 Brier + BCE(e, 1[yhat != y]) + 1e-3 (theta^2 + |beta|^2), all proper."""
    windows = rungs.standardise(fixed, pixels["windows"]) * pixels["inside"][..., None]
    data = pixels | {"windows": windows}
    count = windows.shape[0]
    batch = min(count, BATCH)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=WEIGHT_DECAY)

    def loss(p: dict, use: dict) -> Array:
        hidden = rungs.window_convolution(p["kernel0"])(use["windows"])
        total = jnp.maximum(jnp.sum(use["weight"]), 1e-12)
        if name == "local_temperature":
            log_p = rungs.local_temperature(p, hidden, rungs.start(use["one_step"], use["mean"]))
            return -jnp.sum(use["weight"] * rungs.pick(log_p, use["label"])) / total
        log_p, error, (theta, beta) = rungs.head(p, hidden, use["one_step"], use["mean"], use["delivered"])
        truth = jax.nn.one_hot(use["label"], log_p.shape[-1])
        wrong = (use["delivered"] != use["label"]).astype(jnp.float32)
        each = (
            -rungs.pick(log_p, use["label"])
            + 0.5 * jnp.sum((jnp.exp(log_p) - truth) ** 2, axis=-1)
            + optax.sigmoid_binary_cross_entropy(error, wrong)
            + 1e-3 * (theta**2 + jnp.sum(beta**2, axis=-1))
        )
        return jnp.sum(use["weight"] * each) / total

    def step(carry: tuple, step_key: PRNGKeyArray) -> tuple[tuple, None]:
        p, state = carry
        use = data
        if batch < count:
            chosen = jax.random.randint(step_key, (batch,), 0, count)
            use = {name_: value[chosen] for name_, value in data.items()}
        grads = jax.grad(loss)(p, use)
        # batches differ in how many heavy pixels they hold
        norm = optax.global_norm(grads)
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / jnp.maximum(norm, 1e-12)), grads)
        updates, state = optimizer.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
    return params


def _standardisation(windows: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and 1/std over the sampled pixels; a feature that never varies there is switched off (scale 0), as
    weights that no pixel has trained must not see another value of it later."""
    centre = windows[weight > 0][:, 4].astype(np.float64)
    mean, std = centre.mean(0), centre.std(0)
    scale = np.where(std > 1e-5 * (1 + np.abs(mean)), 1 / np.maximum(std, 1e-12), 0.0)
    return {"center": mean.astype(np.float32), "scale": scale.astype(np.float32)}


def _fit(name: str, pixels: _Pixels, patients: np.ndarray, key: PRNGKeyArray, steps: int) -> Params:
    weight = _patient_weights(pixels, patients)
    if name == "identity":
        return {}
    if name in ("temperature", "vector", "dirichlet"):
        return _fit_affine(name, pixels, weight, key, steps)
    if name == "isotonic":
        return _fit_isotonic(pixels, weight)
    windows = pixels.windows if name == "head" else pixels.base_windows
    fixed = _standardisation(windows, weight)
    first, second = jax.random.split(key)
    initial = rungs.initial(name, pixels.one_step.shape[-1], windows.shape[-1], first)
    arrays = {
        "windows": windows,
        "inside": pixels.inside,
        "one_step": pixels.one_step,
        "mean": pixels.mean,
        "label": pixels.label,
        "delivered": pixels.delivered,
        "weight": weight,
    }
    fitted = _fit_network(name, initial, fixed, arrays, second, steps) if steps else initial
    return {k: np.asarray(v, np.float32) for k, v in (fitted | fixed).items()}


def fit(name: str, data: CalibrationSet, key: PRNGKeyArray, steps: int = 500) -> Params:
    """Parameters of one rung, fitted on all of `data`, every patient with the same total weight.

    steps: AdamW steps of the two networks (local_temperature, head) and the most L-BFGS iterations of
    temperature, vector and dirichlet; 0 leaves them at the identity.

    Raises ValueError for an unknown rung or a set without a usable pixel.
    """
    if name not in RUNGS:
        raise ValueError(f"unknown calibrator {name!r}: one of {', '.join(RUNGS)}")
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
    return _fit(name, _gather(data, rng), np.unique(data.patient), key, steps)


def patient_nll(data: CalibrationSet, probability: Float[np.ndarray, "n h w k"]) -> dict[int, float]:
    """Weighted mean negative log-likelihood in nats of each patient that has a usable pixel."""
    picked = np.take_along_axis(probability, np.maximum(data.label, 0)[..., None].astype(np.int64), -1)[..., 0]
    cost = -np.log(np.maximum(picked, FLOOR))
    weight = np.where(data.label >= 0, data.weight, 0.0).astype(np.float64)
    result = {}
    for patient in np.unique(data.patient):
        own = data.patient == patient
        if weight[own].sum() > 0:
            result[int(patient)] = float((weight[own] * cost[own]).sum() / weight[own].sum())
    return result


def _subset(data: CalibrationSet, keep: np.ndarray) -> CalibrationSet:
    return CalibrationSet(**{f.name: getattr(data, f.name)[keep] for f in dataclasses.fields(data)})


def select(data: CalibrationSet, key: PRNGKeyArray, steps: int = 500, folds: int = 5) -> dict:
    """The rung with the lowest cross-fitted NLL averaged over patients, fitted on all of them.

    Each patient is judged by calibrators fitted on the patients of the other folds. The head must beat the
    global temperature by more than 2 standard errors of the paired differences, or it is dropped. Identity is
    a candidate, so calibration never raises the cross-fitted NLL. Below 8 patients only identity and
    temperature are tried; with one patient nothing can be cross-fitted and the identity stays. `note` says
    so, and is empty otherwise.

    Returns
        table    rung -> {"nll", "difference" (mean nll - temperature's), "se" (its standard error)}; se is
                 None for one patient
        chosen, params, note, patients (their number)
    """
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
    pixels = _gather(data, rng)
    usable = np.unique(pixels.patient)
    count = len(usable)
    if count < 2:
        nll = float(np.mean(list(patient_nll(data, rungs.apply("identity", {}, *_arguments(data))[0]).values())))
        return {
            "table": {"identity": {"nll": nll, "difference": 0.0, "se": None}},
            "chosen": "identity",
            "params": {},
            "note": "1 calibration patient: nothing can be cross-fitted, so no calibration",
            "patients": count,
        }
    ladder, note = RUNGS, ""
    if count < MINIMUM_PATIENTS:
        ladder = SMALL_LADDER
        few = f"{count} calibration patients, fewer than {MINIMUM_PATIENTS}"
        note = f"{few}: only identity and temperature were tried"
    fold = rng.permutation(np.arange(count) % min(folds, count))
    costs: dict[str, dict[int, float]] = {name: {} for name in ladder}
    for number in range(min(folds, count)):
        held = _subset(data, np.isin(data.patient, usable[fold == number]))
        for name in ladder:
            params = _fit(name, pixels, usable[fold != number], jax.random.fold_in(key, number), steps)
            costs[name] |= patient_nll(held, rungs.apply(name, params, *_arguments(held))[0])

    table = {}
    for name in ladder:
        difference = np.array([costs[name][int(p)] - costs["temperature"][int(p)] for p in usable])
        nll = float(np.mean([costs[name][int(p)] for p in usable]))
        se = float(difference.std(ddof=1) / np.sqrt(count))
        table[name] = {"nll": nll, "difference": float(difference.mean()), "se": se}
    candidates = [n for n in ladder if n != "head" or table[n]["difference"] < -2 * table[n]["se"]]
    chosen = min(candidates, key=lambda n: table[n]["nll"])
    params = _fit(chosen, pixels, usable, jax.random.fold_in(key, folds), steps)
    return {"table": table, "chosen": chosen, "params": params, "note": note, "patients": count}


def _arguments(data: CalibrationSet) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return data.features, data.one_step, data.mean, data.delivered
