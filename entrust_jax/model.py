"""EnTrust: composes EnFuse and SegDiff; `encode`, `fuse` and `denoise` are its faces, the two losses its training."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from entrust_jax.enfuse import objective as enfuse_objective
from entrust_jax.enfuse.encoder import Encoder, Evidence
from entrust_jax.enfuse.fusion import Auxiliary, Fused, Fusion, pool_maps
from entrust_jax.errors import UserError
from entrust_jax.layers import Factor, Strides, apply, cumulated, pool, upsample
from entrust_jax.scores import case_mean, cross_entropy, over_cases
from entrust_jax.segdiff import objective as segdiff_objective
from entrust_jax.segdiff import schedule
from entrust_jax.segdiff.denoiser import Denoiser, Projection, Projections

RHO_SHARE = 0.3  # of stage 1, over which the conflict gate closes from 1 to 0
XCOV_SHARE = 0.2  # of stage 1, over which the independence term is ramped in
FUSE_WEIGHT = 0.3  # of L_fuse beside L_diff in stage 2a
NULL_SHARE = 0.05  # of the cases, which lose every modality: the null condition of the attribution

STRIDED_SCALE = 2  # independence is estimated on the grid of this scale, or of the last if there are fewer
COMPUTE = ("float32", "bfloat16")

Batch = dict[str, Array]
Params = Any


# Its shapes are not checked at run time: JAX rebuilds a pytree with other leaves (numpy arrays, shardings).
@no_type_check
@flax.struct.dataclass
class Condition:
    """Everything that the denoiser and TrustMap need of a case under one availability."""

    fused: Fused
    projections: Projections


class EnTrust(nn.Module):
    """The model. Attributes are those of its parts; see `Encoder` and `Denoiser`."""

    modalities: int
    classes: int
    widths: tuple[int, ...]
    d_c: int
    d_u: int
    strides: Strides
    head_dropout: float
    b: float
    compute: str = "float32"
    remat: bool = False

    fusion_module: ClassVar[type[Fusion]] = Fusion
    denoiser_module: ClassVar[type[Denoiser]] = Denoiser

    def setup(self) -> None:
        self.encoder = Encoder(
            self.modalities,
            self.classes,
            self.widths,
            self.strides,
            self.d_c,
            self.d_u,
            head_dropout=self.head_dropout,
            compute=self.compute,
            remat=self.remat,
        )
        self.fusion = self.fusion_module(self.d_c, self.strides)
        self.auxiliary = Auxiliary(self.classes, self.strides)
        self.projection = Projection(self.widths, 64)
        self.denoiser = self.denoiser_module(
            self.classes, self.widths, self.b, self.strides, compute=self.compute, remat=self.remat
        )

    def encode(
        self,
        image: Float[Array, "b m *s"],
        coordinates: Float[Array, "b *s 3"],
        body: Bool[Array, "b *s"],
        *,
        train: bool = False,
    ) -> Evidence:
        """Images -> Evidence, once a case. With train=True a 'dropout' key is needed."""
        return self.encoder(image, coordinates, body.astype(jnp.float32), train=train)

    def fuse(
        self,
        evidence: Evidence,
        availability: Float[Array, "b m *s"],
        *,
        rho: Float[Array, ""] | float = 0.0,
        conflict_scale: Float[Array, " b"] | None = None,
    ) -> Condition:
        """Joins the evidence of any subset, by voxel if need be; probes call it once a subset."""
        fused = self.fusion(evidence, availability, rho=rho, conflict_scale=conflict_scale)
        return Condition(fused, self.projection(fused.F_c, fused.F_u, fused.F_cf, fused.present, evidence.body))

    def denoise(
        self, x_t: Float[Array, "b *s k"], log_snr: Float[Array, " b"], condition: Condition
    ) -> Float[Array, "b *s k"]:
        """Noisy mask -> logits of the clean one, float32."""
        return self.denoiser(x_t, log_snr, condition.projections)

    def fuse_terms(
        self,
        batch: Batch,
        availability: Float[Array, "b m *s"],
        *,
        rho: Float[Array, ""] | float,
        conflict_scale: Float[Array, " b"],
        key: Array,
    ) -> tuple[Condition, dict[str, Array], dict[str, Array]]:
        """Encodes, fuses and evaluates every term of L_fuse: (condition, terms, figures for the log)."""
        evidence = self.encode(batch["image"], batch["coordinates"], batch["body"], train=True)
        condition = self.fuse(evidence, availability, rho=rho, conflict_scale=conflict_scale)
        fused, body, weight = condition.fused, _body(batch), _weight(batch)
        present = fused.present
        k_cross, k_phase = jax.random.split(key)
        cross, cross_weight = _cross_consensus(k_cross, evidence, fused, self.strides)
        consensus, redrawn = self.auxiliary(fused, cross, fused.F_u[1])

        terms = {
            # Every modality that exists is trained, also where dropout hides it from the fusion: p_m stands by itself.
            "uni": enfuse_objective.unimodal(
                evidence.logits, batch["label"], body, batch["present"].astype(jnp.float32), weight
            ),
            "con": over_cases(case_mean(cross_entropy(consensus, batch["label"]), body), weight),
            "rec": _reconstruction(redrawn, batch["image"], cross_weight, body, present, self.strides),
            "prior": over_cases(case_mean(cross_entropy(evidence.prior_logits, batch["label"]), body), weight),
        }
        terms |= _part_terms(k_phase, evidence, fused, body, self.strides)
        # Validation drops nothing, so only slots that kept all they have are comparable with it.
        kept = weight * jnp.all(availability == _availability(batch), axis=tuple(range(1, availability.ndim)))
        kappa = jnp.sum(kept * case_mean(fused.kappa, body))
        return condition, terms, {"kappa_sum": kappa, "kappa_count": jnp.sum(kept)}

    def __call__(self, batch: Batch, key: Array) -> Array:
        """Touches every parameter: for initialisation only."""
        b, m, *space = batch["image"].shape
        ones = jnp.ones((b,), jnp.float32)
        condition, terms, _ = self.fuse_terms(batch, jnp.ones((b, m, *space)), rho=1.0, conflict_scale=ones, key=key)
        logits = self.denoise(jnp.zeros((b, *space, self.classes)), 0 * ones, condition)
        return enfuse_objective.total(terms) + jnp.sum(logits)


def strides_of(config) -> Strides:
    """One factor an axis for every scale of the network that the config's method trains; axes are those of the patch.

    Raises UserError when `config.model.strides` does not fit the scales or the axes, or has another factor than 1 or a
    power of 2.
    """
    widths = config.model.widths if config.method == "entrust" else config.unet.widths
    axes, given = len(config.data.patch), config.model.strides
    if not given:
        return tuple((config.model.space_to_depth if s == 0 else 2,) * axes for s in range(len(widths)))
    mend = f"give one factor for each of {axes} axes, for each of {len(widths)} scales, or () for the usual ones"
    if not all(isinstance(factor, tuple | list) for factor in given):
        raise UserError(f"config.model.strides is {given}; {mend}")
    strides = tuple(tuple(factor) for factor in given)
    if len(strides) != len(widths) or any(len(factor) != axes for factor in strides):
        raise UserError(f"config.model.strides is {strides}; {mend}")
    if not all(isinstance(f, int) and f > 0 and f & (f - 1) == 0 for factor in strides for f in factor):
        raise UserError(f"config.model.strides is {strides}; give factors that are 1 or a power of 2")
    return strides


def compute_of(config) -> str:
    """The type of activations and convolutions. Raises UserError when `config.model.compute` is none of COMPUTE."""
    if config.model.compute not in COMPUTE:
        raise UserError(f"config.model.compute is {config.model.compute!r}; set it to one of {', '.join(COMPUTE)}")
    return config.model.compute


def build(config) -> EnTrust:
    """The model of a config (`config.model`, `config.diffusion.b`, modalities, classes and patch of `config.data`).

    Raises UserError for strides or a compute type that make no sense.
    """
    m = config.model
    return EnTrust(
        modalities=len(config.data.modalities),
        classes=len(config.data.classes),
        widths=tuple(m.widths),
        d_c=m.d_c,
        d_u=m.d_u,
        strides=strides_of(config),
        head_dropout=m.head_dropout,
        b=config.diffusion.b,
        compute=compute_of(config),
        remat=m.remat,
    )


def _availability(batch: Batch) -> Float[Array, "b m *s"]:
    b, m, *space = batch["image"].shape
    present = batch["present"].astype(jnp.float32).reshape(b, m, *(1,) * len(space))
    return jnp.broadcast_to(present, batch["image"].shape)


def _body(batch: Batch) -> Float[Array, "b *s"]:
    labelled = batch["body"] & (batch["label"] >= 0)
    return labelled.astype(jnp.float32)


def _weight(batch: Batch) -> Float[Array, " b"]:
    """Importance weight of a slot; zero for padding and for slots without a labelled body voxel."""
    body = _body(batch)
    some = jnp.sum(body, axis=tuple(range(1, body.ndim))) > 0
    return batch["weight"] * batch["valid"] * some


def _samples(
    x: Float[Array, "b *t d"], factor: Factor, lattice: Factor, phase: Int[Array, " axes"]
) -> Float[Array, "b n d"]:
    """A scale's voxels on a lattice, flattened, float32: the same n for every scale, so that all go in one call.

    Finer scales are strided, for neighbours are no independent samples; coarser ones repeat their voxels.
    factor, lattice: voxels of the finest scale along each axis of this scale's voxels and of the lattice's cells.
    phase: where the lattice begins, in voxels of the finest scale. It moves from step to step: a network tells the
    phases of a lattice apart, and would be independent on a fixed one alone.
    """
    x = upsample(x, tuple(max(f // cell, 1) for f, cell in zip(factor, lattice, strict=True)))
    for i, (f, cell) in enumerate(zip(factor, lattice, strict=True), 1):
        stride = max(cell // f, 1)
        count = x.shape[i] // stride
        cells = jax.lax.slice_in_dim(x, 0, count * stride, axis=i)
        cells = cells.reshape(*x.shape[:i], count, stride, *x.shape[i + 1 :])
        x = jax.lax.dynamic_index_in_dim(cells, phase[i - 1] // f, axis=i + 1, keepdims=False)
    # Not -1: a single modality has 0 pairs.
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).astype(jnp.float32)


def _part_terms(
    key: Array, evidence: Evidence, fused: Fused, body: Float[Array, "b *s"], strides: Strides
) -> dict[str, Array]:
    """Independence, alignment and variance terms: means over the scales, each on the same strided lattice."""
    finest = cumulated(((1,) * len(strides[0]), *strides[1:]))  # relative to the finest scale
    lattice, whole = finest[: STRIDED_SCALE + 1][-1], cumulated(strides)
    phase = jax.random.randint(key, (len(lattice),), 0, jnp.array(lattice))

    def stack(parts):  # [scale, b, n, d]
        return jnp.stack([_samples(x, f, lattice, phase) for f, x in zip(finest, parts, strict=True)])

    def by_modality(parts):  # [scale, m, b, n, d]
        each = [jax.vmap(lambda x, f=f: _samples(x, f, lattice, phase), in_axes=1) for f in finest]
        return jnp.stack([one(x) for one, x in zip(each, parts, strict=True)])

    present = fused.present.T
    pairs = [jnp.moveaxis(pool_maps(fused.kappa_pairs, f), 1, -1) for f in whole]
    kappa = [pool(fused.kappa[..., None], f, jnp.max) for f in whole]
    inside = [pool(body[..., None], f) for f in whole]
    mask = (stack(inside)[..., 0] > 0.5).astype(jnp.float32)
    return jax.tree.map(
        jnp.mean,
        jax.vmap(functools.partial(_one_scale, present=present))(
            by_modality(evidence.c), by_modality(evidence.u), stack(fused.F_c), stack(fused.F_cf),
            jnp.moveaxis(stack(pairs), -1, 1), stack(kappa)[..., 0], mask,
        ),
    )  # fmt: skip


def _one_scale(
    c: Float[Array, "m b n d"],
    u: Float[Array, "m b n e"],
    F_c: Float[Array, "b n d"],
    F_cf: Float[Array, "b n d"],
    kappa_pairs: Float[Array, "p b n"],
    kappa: Float[Array, "b n"],
    mask: Float[Array, "b n"],
    *,
    present: Float[Array, "m b"],
) -> dict[str, Array]:
    masks = mask[None] * present[..., None]
    hinge = jax.vmap(lambda x, k: enfuse_objective.variance_hinge(x.reshape(-1, x.shape[-1]), k.reshape(-1)))
    seen = (jnp.sum(masks, axis=(1, 2)) > 0).astype(jnp.float32)
    # One call over the channels of c_m and u_m together; each part counts the same whatever its width.
    both = jnp.concatenate([c, u], axis=-1)
    share = jnp.concatenate([jnp.full(c.shape[-1], 1 / c.shape[-1]), jnp.full(u.shape[-1], 1 / u.shape[-1])])
    spread = jnp.sum(seen[:, None] * hinge(both, masks) * share[None])
    active = mask * (kappa > enfuse_objective.ACTIVE_KAPPA)
    enough = jnp.sum(active) >= enfuse_objective.ACTIVE_VOXELS
    flat = F_cf.reshape(-1, F_cf.shape[-1])
    spread += enough * jnp.mean(enfuse_objective.variance_hinge(flat, active.reshape(-1)))
    return {
        "xcov": enfuse_objective.independence(F_c, F_cf, c, u, mask, present),
        "align": enfuse_objective.alignment(c, kappa_pairs, mask, present),
        "var": spread,
    }


def _cross_consensus(
    key: Array, evidence: Evidence, fused: Fused, strides: Strides
) -> tuple[Float[Array, "b m *t d"], Float[Array, "b m *t"]]:
    """The consensus that redraws each modality at scale 1: F_c, or (p = .5) that of a random other available modality,

    weighted by 1 - kappa_mn: c must be exchangeable between modalities where they do not conflict.
    """
    c = evidence.c[1]
    b, m = c.shape[:2]
    F_c = jnp.broadcast_to(fused.F_c[1][:, None], c.shape)
    k_swap, k_other = jax.random.split(key)
    score = jax.random.uniform(k_other, (b, m, m)) * fused.present[:, None] * (1 - jnp.eye(m)[None])
    other = jnp.argmax(score, axis=-1)
    swap = jax.random.bernoulli(k_swap, 0.5, (b, m)) & (jnp.max(score, axis=-1) > 0)

    def expand(x):
        return x.reshape(*x.shape, *(1,) * (c.ndim - 2))

    swapped = jnp.take_along_axis(c, expand(other), axis=1)
    cbar = jnp.where(expand(swap), swapped, F_c)

    first, second = jnp.triu_indices(m, 1)
    kappa = jnp.zeros((b, m, m, *c.shape[2:-1]))
    if len(first):
        pairs = pool_maps(fused.kappa_pairs, cumulated(strides)[1])
        kappa = kappa.at[:, first, second].set(pairs).at[:, second, first].set(pairs)
    between = jnp.take_along_axis(kappa, expand(other)[:, :, None, ..., 0], axis=2)[:, :, 0]
    return cbar, 1 - between * expand(swap)[..., 0]


def _reconstruction(
    redrawn: Float[Array, "b m *t"],
    image: Float[Array, "b m *s"],
    weight: Float[Array, "b m *t"],
    body: Float[Array, "b *s"],
    present: Float[Array, "b m"],
    strides: Strides,
) -> Array:
    """L_rec: mean absolute error against the image pooled to scale 1, inside the body."""
    factor = cumulated(strides)[1]
    target = pool_maps(image, factor)
    inside = (pool_maps(body[:, None], factor) > 0.5) * present.reshape(*present.shape, *(1,) * (body.ndim - 1))
    w = inside * weight
    return jnp.sum(w * jnp.abs(redrawn - target)) / jnp.maximum(jnp.sum(w), 1.0)


def enfuse_loss(
    model: EnTrust,
    params: Params,
    batch: Batch,
    key: Array,
    progress: Array,
    *,
    dropout: Callable = enfuse_objective.availability_dropout,
) -> tuple[Array, dict]:
    """Stage 1: L_fuse with L_pi. `progress` in [0, 1] closes the conflict gate's rho and ramps independence in.

    `dropout` is there for the phantom suite's ablation.
    """
    k_drop, k_head, k_cross = jax.random.split(key, 3)
    b, _, *space = batch["image"].shape
    no_null = jnp.zeros((b,), bool)
    availability, conflict_scale = dropout(k_drop, batch["present"], tuple(space), no_null)
    rho = jnp.maximum(0.0, 1 - progress / RHO_SHARE)
    _, terms, figures = apply(
        model,
        params,
        batch,
        availability,
        rho=rho,
        conflict_scale=conflict_scale,
        key=k_cross,
        method="fuse_terms",
        rngs={"dropout": k_head},
    )
    loss = enfuse_objective.total(terms, jnp.minimum(1.0, progress / XCOV_SHARE))
    return loss, {"loss": loss, **terms, **figures}


def noisy_truth(
    denoise: Callable[[Array, Array], Array], x0: Float[Array, "b *s k"], log_snr: Float[Array, " b"], eps: Array
) -> Float[Array, "b *s k"]:
    """x_t from the labelled mask: what the denoiser is trained on, and what makes its minimiser exact."""
    del denoise
    return schedule.diffuse(x0, log_snr, eps)


def weighted_ce(logits: Float[Array, "b *s k"], label: Int[Array, "b *s"], weight: Array) -> Float[Array, " b"]:
    """Mean cross-entropy of each case under voxel weights: strictly proper."""
    return case_mean(cross_entropy(logits, label), weight)


def segdiff_loss(
    model: EnTrust,
    params: Params,
    batch: Batch,
    key: Array,
    *,
    low: float,
    high: float,
    draws: int,
    noisy: Callable = noisy_truth,
    score: Callable = weighted_ce,
    dropout: Callable = enfuse_objective.availability_dropout,
) -> tuple[Array, dict]:
    """Stage 2a: L_diff + .3 L_fuse (the prior is frozen by now). `draws` noise levels are trained per encoded case.

    `noisy`, `score` and `dropout` are there for the ablations of the phantom suite, which show what other choices cost.
    """
    k_drop, k_null, k_head, k_cross, k_u, k_terminal, k_eps = jax.random.split(key, 7)
    b, _, *space = batch["image"].shape
    terminal = segdiff_objective.terminal_slots(k_terminal, b * draws)
    # The null condition is drawn jointly with pure noise: there the attribution will ask for it.
    null = jax.random.bernoulli(k_null, NULL_SHARE, (b,))
    availability, conflict_scale = dropout(k_drop, batch["present"], tuple(space), null)
    terminal = terminal | jnp.repeat(null, draws)
    condition, terms, figures = apply(
        model,
        params,
        batch,
        availability,
        rho=0.0,
        conflict_scale=conflict_scale,
        key=k_cross,
        method="fuse_terms",
        rngs={"dropout": k_head},
    )
    kappa = jax.lax.stop_gradient(condition.fused.kappa)
    log_snr = jnp.where(terminal, low, schedule.stratified(k_u, b * draws, low, high))
    # Draws lie behind their case, not before it: so the batch axis stays split over the devices as it is.
    repeat = functools.partial(jax.tree.map, lambda x: jnp.repeat(x, draws, axis=0))
    label, projections, weight = repeat((batch["label"], condition.projections, _weight(batch)))
    x0 = schedule.scale_onehot(label, model.classes, model.b)
    denoise = functools.partial(
        apply, model, params, condition=condition.replace(projections=projections), method="denoise"
    )
    logits = denoise(noisy(denoise, x0, log_snr, jax.random.normal(k_eps, x0.shape)), log_snr)
    ce = score(logits, label, repeat(segdiff_objective.voxel_weight(_body(batch), kappa)))
    diffusion = over_cases(ce, weight)
    frozen_prior = {name: value for name, value in terms.items() if name != "prior"}
    loss = diffusion + FUSE_WEIGHT * enfuse_objective.total(frozen_prior)
    sums, counts = segdiff_objective.log_snr_bins(ce, log_snr, weight, low, high)
    return loss, {
        "loss": loss, "diffusion": diffusion, **terms, **figures, "ce_sum": sums, "ce_count": counts,
    }  # fmt: skip


def validate(
    model: EnTrust, params: Params, batch: Batch, log_snr: Float[Array, " l"], key: Array
) -> tuple[Float[Array, "l b"], Float[Array, " b"], Float[Array, " b"]]:
    """Per case, inside the body, all modalities kept: CE of the denoiser at each log SNR, mean CE of the unimodal heads

    of the modalities that are there, mean kappa.
    """
    b = batch["image"].shape[0]
    present = batch["present"].astype(jnp.float32)
    evidence = apply(model, params, batch["image"], batch["coordinates"], batch["body"], method="encode")
    condition = apply(model, params, evidence, _availability(batch), method="fuse")
    x0 = schedule.scale_onehot(batch["label"], model.classes, model.b)
    eps = noise_of_cases(key, batch["case"], x0.shape[1:])
    body = _body(batch)

    def at(level):
        levels = jnp.full((b,), level)
        logits = apply(model, params, schedule.diffuse(x0, levels, eps), levels, condition, method="denoise")
        return case_mean(cross_entropy(logits, batch["label"]), body)

    unimodal = jax.vmap(lambda x: case_mean(cross_entropy(x, batch["label"]), body), in_axes=1)(evidence.logits)
    unimodal = jnp.sum(present.T * unimodal, axis=0) / jnp.maximum(jnp.sum(present.T, axis=0), 1.0)
    return jax.vmap(at)(log_snr), unimodal, case_mean(condition.fused.kappa, body)


def noise_of_cases(key: Array, case: Int[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b *s k"]:
    """Standard normal noise keyed by the scan's number: the same whatever the batching."""
    return jax.vmap(lambda c: jax.random.normal(jax.random.fold_in(key, c), shape))(case)
