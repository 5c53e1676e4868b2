"""Probabilities that hold: a ladder of calibrators, fitted on patients that the model has not seen and chosen
by cross-fitting.

Every rung starts from the same base, log p = sigmoid(2) log p_1 + (1 - sigmoid(2)) log pbar (normalised):
mostly the one-step prediction p_1, because the mean pbar of N hypotheses carries Monte-Carlo noise. All
log-likelihoods are in nats.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage
import scipy.optimize
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray
from scipy.special import log_softmax

RUNGS = ("identity", "temperature", "vector", "dirichlet", "local_temperature", "isotonic", "head")
SMALL_LADDER = ("identity", "temperature")
MINIMUM_PATIENTS = 8
MIX = 2.0
FLOOR = 1e-6
PIXELS = 2**16
BATCH = 2**13
# the decay pulls the networks to the identity: tens of patients do not pay for thousands of weights
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1.0
SLICES = 16
DISTANCE_CAP = 10.0
UNCERTAIN_ENTROPY = 0.05
BOUNDARY_BAND = 2.0
FEATURE_CLIP = 10.0
ISOTONIC_GRID = np.linspace(-14.0, 14.0, 281, dtype=np.float32)
HEAD_WIDTH, LOCAL_WIDTH = 16, 8

Params = dict[str, np.ndarray]


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


# ---- inputs ------------------------------------------------------------------------------------------------


def log_probability(probability: Float[np.ndarray, "*s k"]) -> Float[np.ndarray, "*s k"]:
    """log max(p, 1e-6) in float32, as CalibrationSet and `apply` take it."""
    return np.log(np.maximum(probability, FLOOR)).astype(np.float32)


def signed_distance(label: Integer[np.ndarray, "n h w"]) -> Float[np.ndarray, "n h w"]:
    """Distance in pixels to the nearest border between two classes in the same slice, negative in the
    foreground.

    The border runs between pixels, so the pixels along it have .5. A slice of a single class has h + w
    everywhere.
    """
    result = np.empty(label.shape, np.float32)
    for index, plane in enumerate(label):
        distance = np.full(plane.shape, float(sum(plane.shape)))
        found = np.unique(plane)
        if len(found) > 1:
            # the nearest pixel of another class lies across the border, whichever class it is
            masks = [plane == k for k in found]
            depth = [np.asarray(scipy.ndimage.distance_transform_edt(mask)) for mask in masks]
            distance = np.sum(depth, axis=0) - 0.5
        result[index] = np.where(plane > 0, -distance, distance)
    return result


def signed_distance_mm(label: Integer[np.ndarray, "d h w"], spacing: Sequence[float]) -> Float[np.ndarray, "d h w"]:
    """Distance in mm to the nearest border between two classes in the volume, negative in the foreground.

    From a voxel's centre to that of the nearest voxel of another class, less half the finest spacing, for the border
    runs between them. A volume of a single class has its extent everywhere.
    """
    found = np.unique(label)
    if len(found) == 1:
        distance = np.full(label.shape, np.dot(label.shape, spacing), np.float32)
    else:
        distance = np.full(label.shape, -min(spacing) / 2, np.float32)
        for k in found:  # a voxel is inside one class alone; one transform at a time, for they are large
            distance += np.asarray(scipy.ndimage.distance_transform_edt(label == k, sampling=spacing))
    return np.where(label > 0, -distance, distance)


def importance_weights(
    entropy: Float[np.ndarray, "n h w"],
    boundary_distance: Float[np.ndarray, "n h w"],
    body: Bool[np.ndarray, "n h w"],
    rng: np.random.Generator,
    per_slice: int = 1024,
) -> Float[np.ndarray, "n h w"]:
    """Weights 1/q of a random sample of the body's pixels and 0 elsewhere; their expectation is 1 in the
    body.

    On average per_slice * n pixels are drawn: half of them from those with entropy > .05 or within 2 pixels
    of the delivered border, half from the rest; a group smaller than its half is taken whole.
    """
    interesting = body & ((entropy > UNCERTAIN_ENTROPY) | (np.abs(boundary_distance) <= BOUNDARY_BAND))
    probability = np.zeros(body.shape)
    for group in (interesting, body & ~interesting):
        size = int(group.sum())
        if size:
            probability[group] = min(1.0, per_slice * len(body) / 2 / size)
    drawn = rng.random(body.shape) < probability
    return np.where(drawn, 1.0 / np.maximum(probability, 1e-12), 0.0).astype(np.float32)


def features(
    maps: dict[str, np.ndarray], present: Bool[np.ndarray, "m"]
) -> tuple[Float[np.ndarray, "n h w f"], tuple[str, ...]]:
    """The head's inputs phi(u) of one scan (n slices) and their names, from the maps that the method has.

    maps: any of mean, one_step [n h w k] probabilities; entropy, divergence, within, conflict, js,
    delta_conflict, gap [n h w]; delta_modality [m n h w]; others are ignored. min(|border|, 10)/10, border the signed
    distance to that of the delivered mask in voxels, and the availability of each modality always follow. The order is
    fixed, so equal sets of maps give equal columns.
    """
    names, columns = [], []
    for name in ("mean", "one_step"):
        if name in maps:
            names += [f"log_{name}_{k}" for k in range(maps[name].shape[-1])]
            columns += list(np.moveaxis(log_probability(maps[name]), -1, 0))
    for name in ("entropy", "divergence", "within", "conflict", "js", "delta_conflict", "gap"):
        if name in maps:
            names.append(name)
            columns.append(maps[name])
    if "delta_modality" in maps:
        names += [f"delta_modality_{m}" for m in range(len(maps["delta_modality"]))]
        columns += list(maps["delta_modality"])
    names.append("border_distance")
    columns.append(np.minimum(np.abs(maps["border"]), DISTANCE_CAP) / DISTANCE_CAP)
    for m, here in enumerate(present):
        names.append(f"present_{m}")
        columns.append(np.full(maps["border"].shape, float(here)))
    return np.stack([np.asarray(c, np.float32) for c in columns], axis=-1), tuple(names)


# ---- the rungs ---------------------------------------------------------------------------------------------


def _base(one_step: Array, mean: Array) -> Array:
    share = jax.nn.sigmoid(MIX)
    return jax.nn.log_softmax(share * one_step + (1 - share) * mean, axis=-1)


def _local_inputs(base: Array) -> Array:
    """log p and its entropy, which is all that local temperature scaling may see."""
    return jnp.concatenate([base, -jnp.sum(jnp.exp(base) * base, axis=-1, keepdims=True)], axis=-1)


def _standardise(params: dict, x: Array) -> Array:
    one = (1,) * (x.ndim - 1) + (-1,)
    z = (x - params["center"].reshape(one)) * params["scale"].reshape(one)
    return jnp.clip(z, -FEATURE_CLIP, FEATURE_CLIP)


def _add(x: Array, bias: Array) -> Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def _window_convolution(kernel: Array) -> Callable[[Array], Array]:
    """The 3x3 convolution at single pixels, whose zero-padded windows [p, 9, f] are given."""
    return lambda windows: windows.reshape((windows.shape[0], -1)) @ kernel.reshape((-1, kernel.shape[-1]))


def _image_convolution(kernel: Array) -> Callable[[Array], Array]:
    return lambda image: jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _log_not(log_p: Array, label: Array) -> Array:
    """log(1 - p[label]) without cancellation: the log-sum of the other classes."""
    classes = jnp.arange(log_p.shape[-1]).reshape((1,) * label.ndim + (-1,))
    others = jnp.where(classes == label[..., None], -jnp.inf, log_p)
    return jnp.maximum(jax.nn.logsumexp(others, axis=-1), -30.0)


def _pick(log_p: Array, label: Array) -> Array:
    return jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]


def _head(
    params: dict, hidden: Array, one_step: Array, mean: Array, delivered: Array
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Equations of the head after its first convolution (ours):

        [theta, beta_1..K, omega, eps] = conv1x1(SiLU(conv1x1(SiLU(hidden))))                zero-initialised
        log p_mix = sigmoid(omega + 2) log p_1 + (1 - sigmoid(omega + 2)) log pbar
        p_cal = softmax(exp(theta) log p_mix + beta),  e = sigmoid(logit(1 - p_cal[yhat]) + eps)

    Returns log p_cal, logit e, (theta, beta).
    """
    h = jax.nn.silu(_add(hidden, params["bias0"]))
    h = jax.nn.silu(_add(h @ params["kernel1"], params["bias1"]))
    out = _add(h @ params["kernel2"], params["bias2"])
    classes = one_step.shape[-1]
    theta, beta, omega, eps = out[..., :1], out[..., 1 : 1 + classes], out[..., -2:-1], out[..., -1]
    share = jax.nn.sigmoid(omega + MIX)
    log_p = jax.nn.log_softmax(jnp.exp(theta) * (share * one_step + (1 - share) * mean) + beta, axis=-1)
    error = _log_not(log_p, delivered) - jnp.maximum(_pick(log_p, delivered), -30.0) + eps
    return log_p, error, (theta[..., 0], beta)


def _local_temperature(params: dict, hidden: Array, base: Array) -> Array:
    """softmax(log p / T(u)), T = exp(conv1x1(SiLU(conv3x3(log p, H)))) (Ding et al. 2021, arXiv
    2008.05105).
    """
    h = jax.nn.silu(_add(hidden, params["bias0"]))
    return jax.nn.log_softmax(base * jnp.exp(-_add(h @ params["kernel1"], params["bias1"])), axis=-1)


def _affine(name: str, params: dict, base: Array) -> Array:
    """The rungs that see nothing but the pixel's own log-probabilities.

    temperature: log p / T (Guo et al. 2017); vector: w_k log p_k + b_k (the same); dirichlet: W log p + b
    (Kull et al. 2019).
    """
    if name == "identity":
        return base
    if name == "temperature":
        return jax.nn.log_softmax(base * jnp.exp(-params["log_temperature"]), axis=-1)
    if name == "vector":
        one = (1,) * (base.ndim - 1) + (-1,)
        return jax.nn.log_softmax(_add(base * params["scale"].reshape(one), params["bias"]), axis=-1)
    return jax.nn.log_softmax(_add(base @ params["matrix"], params["bias"]), axis=-1)


def _isotonic(params: dict, base: Array) -> Array:
    """One-vs-rest isotonic maps of p_k, normalised to sum to one (Zadrozny and Elkan 2002)."""
    grid = jnp.asarray(ISOTONIC_GRID)
    columns = []
    for k in range(base.shape[-1]):
        logit = base[..., k] - _log_not(base, jnp.full(base.shape[:-1], k))
        columns.append(jnp.interp(logit, grid, params["value"][k]))
    p = jnp.stack(columns, axis=-1)
    return jnp.log(p) - jnp.log(jnp.sum(p, axis=-1, keepdims=True))


def _initial(name: str, classes: int, inputs: int, key: PRNGKeyArray) -> dict[str, Array]:
    """Parameters with which the rung returns the base probabilities."""
    zeros = jnp.zeros
    if name == "temperature":
        return {"log_temperature": zeros(())}
    if name == "vector":
        return {"scale": jnp.ones(classes), "bias": zeros(classes)}
    if name == "dirichlet":
        return {"matrix": jnp.eye(classes), "bias": zeros(classes)}
    first, second = jax.random.split(key)
    width = HEAD_WIDTH if name == "head" else LOCAL_WIDTH
    params = {
        "kernel0": jax.random.normal(first, (3, 3, inputs, width)) / np.sqrt(9 * inputs),
        "bias0": zeros(width),
    }
    if name == "local_temperature":
        return params | {"kernel1": zeros((width, 1)), "bias1": zeros(1)}
    return params | {
        "kernel1": jax.random.normal(second, (width, width)) / np.sqrt(width),
        "bias1": zeros(width),
        "kernel2": zeros((width, classes + 3)),
        "bias2": zeros(classes + 3),
    }


# ---- fitting -----------------------------------------------------------------------------------------------


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
    share = 1 / (1 + np.exp(-MIX))
    base = log_softmax(share * data.one_step + (1 - share) * data.mean, axis=-1)
    local = np.concatenate([base, -(np.exp(base) * base).sum(-1, keepdims=True)], axis=-1)
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
    unflatten = jax.flatten_util.ravel_pytree(_initial(name, base.shape[-1], 0, jax.random.key(0)))[1]

    def loss(x: Array) -> Array:
        params = unflatten(x)
        return -jnp.sum(weight * _pick(_affine(name, params, base), label)) + _penalty(name, params)

    return jax.value_and_grad(loss)(flat)


def _fit_affine(name: str, pixels: _Pixels, weight: np.ndarray, key: PRNGKeyArray, steps: int) -> Params:
    initial = _initial(name, pixels.one_step.shape[-1], 0, key)
    flat, unflatten = jax.flatten_util.ravel_pytree(initial)
    base = _base(jnp.asarray(pixels.one_step), jnp.asarray(pixels.mean))
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
    log_p = np.asarray(_base(jnp.asarray(pixels.one_step), jnp.asarray(pixels.mean)), np.float64)
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
        values.append(np.interp(ISOTONIC_GRID, x, y))
    return {"value": np.clip(np.stack(values), FLOOR, 1 - FLOOR).astype(np.float32)}


@functools.partial(jax.jit, static_argnames=("name", "steps"))
def _fit_network(name: str, params: dict, fixed: dict, pixels: dict, key: PRNGKeyArray, steps: int) -> dict:
    """AdamW on random batches of the sampled pixels. Losses: the local temperature's NLL; for the head
    NLL + .5 Brier + BCE(e, 1[yhat != y]) + 1e-3 (theta^2 + |beta|^2), all proper."""
    windows = _standardise(fixed, pixels["windows"]) * pixels["inside"][..., None]
    data = pixels | {"windows": windows}
    count = windows.shape[0]
    batch = min(count, BATCH)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=WEIGHT_DECAY)

    def loss(p: dict, use: dict) -> Array:
        hidden = _window_convolution(p["kernel0"])(use["windows"])
        total = jnp.maximum(jnp.sum(use["weight"]), 1e-12)
        if name == "local_temperature":
            log_p = _local_temperature(p, hidden, _base(use["one_step"], use["mean"]))
            return -jnp.sum(use["weight"] * _pick(log_p, use["label"])) / total
        log_p, error, (theta, beta) = _head(p, hidden, use["one_step"], use["mean"], use["delivered"])
        truth = jax.nn.one_hot(use["label"], log_p.shape[-1])
        wrong = (use["delivered"] != use["label"]).astype(jnp.float32)
        each = (
            -_pick(log_p, use["label"])
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
    initial = _initial(name, pixels.one_step.shape[-1], windows.shape[-1], first)
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


@functools.partial(jax.jit, static_argnames="name")
def _apply(
    name: str, params: dict, inputs: Array, one_step: Array, mean: Array, delivered: Array
) -> tuple[Array, Array]:
    base = _base(one_step, mean)
    if name == "head":
        hidden = _image_convolution(params["kernel0"])(_standardise(params, inputs))
        log_p, error, _ = _head(params, hidden, one_step, mean, delivered)
        return jnp.exp(log_p), jax.nn.sigmoid(error)
    if name == "local_temperature":
        hidden = _image_convolution(params["kernel0"])(_standardise(params, _local_inputs(base)))
        log_p = _local_temperature(params, hidden, base)
    elif name == "isotonic":
        log_p = _isotonic(params, base)
    else:
        log_p = _affine(name, params, base)
    return jnp.exp(log_p), jnp.exp(_log_not(log_p, delivered))


def apply(
    name: str,
    params: Params,
    inputs: Float[np.ndarray, "n h w f"],
    one_step: Float[np.ndarray, "n h w k"],
    mean: Float[np.ndarray, "n h w k"],
    delivered: Integer[np.ndarray, "n h w"],
) -> tuple[Float[np.ndarray, "n h w k"], Float[np.ndarray, "n h w"]]:
    """Calibrated probabilities p_cal and the probability e that the delivered mask is wrong, of new slices.

    inputs: `features` (only the head reads them); one_step, mean: log-probabilities. Rungs without an error
    output give e = 1 - p_cal[yhat]. Compiled once per slice shape: slices go through in groups of 16.

    Raises ValueError for an unknown rung, or features that the head was not fitted on.
    """
    if name not in RUNGS:
        raise ValueError(f"unknown calibrator {name!r}: one of {', '.join(RUNGS)}")
    if name == "head" and inputs.shape[-1] != len(params["center"]):
        raise ValueError(f"the head was fitted on {len(params['center'])} features, got {inputs.shape[-1]}")
    if name != "head":
        inputs = inputs[..., :0]
    arrays = [np.asarray(a, np.float32) for a in (inputs, one_step, mean)] + [np.asarray(delivered, np.int32)]
    probability, error = np.empty(one_step.shape, np.float32), np.empty(delivered.shape, np.float32)
    for start in range(0, len(delivered), SLICES):
        part = [a[start : start + SLICES] for a in arrays]
        size = len(part[0])
        part = [np.pad(a, [(0, SLICES - size)] + [(0, 0)] * (a.ndim - 1)) for a in part]
        p, e = _apply(name, params, *part)
        probability[start : start + size], error[start : start + size] = (
            np.asarray(p)[:size],
            np.asarray(e)[:size],
        )
    return probability, error


# ---- choosing ----------------------------------------------------------------------------------------------


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
        nll = float(np.mean(list(patient_nll(data, apply("identity", {}, *_arguments(data))[0]).values())))
        return {
            "table": {"identity": {"nll": nll, "difference": 0.0, "se": None}},
            "chosen": "identity",
            "params": {},
            "note": "1 calibration patient: nothing can be cross-fitted, so no calibration",
            "patients": count,
        }
    rungs, note = RUNGS, ""
    if count < MINIMUM_PATIENTS:
        rungs = SMALL_LADDER
        few = f"{count} calibration patients, fewer than {MINIMUM_PATIENTS}"
        note = f"{few}: only identity and temperature were tried"
    fold = rng.permutation(np.arange(count) % min(folds, count))
    costs: dict[str, dict[int, float]] = {name: {} for name in rungs}
    for number in range(min(folds, count)):
        held = _subset(data, np.isin(data.patient, usable[fold == number]))
        for name in rungs:
            params = _fit(name, pixels, usable[fold != number], jax.random.fold_in(key, number), steps)
            costs[name] |= patient_nll(held, apply(name, params, *_arguments(held))[0])

    table = {}
    for name in rungs:
        difference = np.array([costs[name][int(p)] - costs["temperature"][int(p)] for p in usable])
        nll = float(np.mean([costs[name][int(p)] for p in usable]))
        se = float(difference.std(ddof=1) / np.sqrt(count))
        table[name] = {"nll": nll, "difference": float(difference.mean()), "se": se}
    candidates = [n for n in rungs if n != "head" or table[n]["difference"] < -2 * table[n]["se"]]
    chosen = min(candidates, key=lambda n: table[n]["nll"])
    params = _fit(chosen, pixels, usable, jax.random.fold_in(key, folds), steps)
    return {"table": table, "chosen": chosen, "params": params, "note": note, "patients": count}


def _arguments(data: CalibrationSet) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return data.features, data.one_step, data.mean, data.delivered
