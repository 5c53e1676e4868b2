"""What EnTrust loses without one of its parts: each ablation changes one thing, and theory says what that should do.

Ablations are patches of this suite, not options of the product: subclasses of the network with equal parameters, other
terms in the losses, another calibration head, another way of drawing hypotheses.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from entrust_jax import model as entrust
from entrust_jax.baselines.unet import soft_dice
from entrust_jax.enfuse import objective
from entrust_jax.enfuse.conflict import gate
from entrust_jax.enfuse.encoder import Evidence
from entrust_jax.enfuse.fusion import Fusion
from entrust_jax.layers import cumulated, pool
from entrust_jax.segdiff import sampler, schedule
from entrust_jax.segdiff.denoiser import Denoiser

REFERENCE = "reference"
ALL = ("everything",)  # inputs of a calibration head
HOT = 1.6  # noise amplitude in full conflict, in units of the right one


class MeanFusion(entrust.EnTrust):
    """Every modality that is there counts the same: no learned reliability."""

    def encode(self, *args: Any, **options: Any) -> Evidence:
        evidence = super().encode(*args, **options)
        return dataclasses.replace(evidence, reliability=tuple(0 * r for r in evidence.reliability))


class NoConflictFeatures(entrust.EnTrust):
    """F_cf is zero: the denoiser must find conflict in F_c and F_u by itself."""

    def fuse(self, evidence: Evidence, availability: Array, **options: Any) -> entrust.Condition:
        nothing = jnp.zeros(availability.shape[:1])
        return super().fuse(evidence, availability, **(options | {"conflict_scale": nothing}))


class NoIndependence(entrust.EnTrust):
    """Without the cross-covariance objective."""

    def fuse_terms(self, *args: Any, **options: Any) -> Any:
        condition, terms, figures = super().fuse_terms(*args, **options)
        return condition, terms | {"xcov": 0 * terms["xcov"]}, figures


class DomainTerm(entrust.EnTrust):
    """Content that must not tell its modality: what ShaSpec's domain loss aims at (Wang et al. 2023, arXiv 2307.14126),

    without a classifier.
    """

    def fuse_terms(self, batch: entrust.Batch, *args: Any, **options: Any) -> Any:
        condition, terms, figures = super().fuse_terms(batch, *args, **options)
        evidence = self.encode(batch["image"], batch["coordinates"], batch["body"])
        body = evidence.body[..., None]
        each = [
            modality_identity(c, pool(body, factor)[..., 0] > 0.5, condition.fused.present)
            for factor, c in zip(cumulated(self.strides), evidence.c, strict=True)
        ]
        return condition, terms | {"xcov": terms["xcov"] + jnp.mean(jnp.stack(each))}, figures


def modality_identity(
    c: Float[Array, "b m *t d"], mask: Bool[Array, "b *t"], present: Float[Array, "b m"]
) -> Float[Array, ""]:
    """Mean squared correlation of c_m, averaged over each case, with which modality m is.

    A linear probe tells the modality by what this correlates with.
    """
    k = mask[:, None, ..., None]
    axes = tuple(range(2, c.ndim - 1))
    means = jnp.sum(k * c, axis=axes) / jnp.maximum(jnp.sum(k, axis=axes), 1.0)
    b, m = present.shape
    identity = jnp.broadcast_to(jnp.eye(m)[None], (b, m, m))
    return objective.xcov(means.reshape(b * m, -1), identity.reshape(b * m, m), present.reshape(-1))


class DivergenceFusion(Fusion):
    """Jensen-Shannon divergence wherever kappa stood: features, gate, weights of the loss, map."""

    def opposition(self, posterior: Array, support: Array, availability: Array) -> tuple[Array, Array, Array, Array]:
        pairs, contested, kappa, js = super().opposition(posterior, support, availability)
        del kappa
        return jnp.broadcast_to(js[:, None], pairs.shape), 0 * contested, js, js


class DivergenceAsConflict(entrust.EnTrust):
    """Conflict measured by how far the posteriors lie apart, not by how they oppose each other."""

    fusion_module: ClassVar[type[Fusion]] = DivergenceFusion


class GlobalPrior(entrust.EnTrust):
    """The class frequency of the whole body in place of the positional base rate pi(u)."""

    def encode(self, *args: Any, **options: Any) -> Evidence:
        evidence = super().encode(*args, **options)
        space = tuple(range(1, evidence.body.ndim))
        inside = evidence.body[..., None]
        rate = jnp.sum(inside * jax.nn.softmax(evidence.prior_logits, axis=-1), axis=space, keepdims=True)
        rate = rate / jnp.maximum(jnp.sum(inside, axis=space, keepdims=True), 1.0)
        return dataclasses.replace(evidence, prior_logits=jnp.broadcast_to(jnp.log(rate), evidence.prior_logits.shape))


class HotSampling(entrust.EnTrust):
    """The reference itself; a class of its own, so that what was compiled with the right noise is not used again."""


class ForeignConflict(entrust.EnTrust):
    """Every case is given the F_cf of the case before it in the batch."""

    def fuse(self, evidence: Evidence, availability: Array, **options: Any) -> entrust.Condition:
        fused = super().fuse(evidence, availability, **options).fused
        fused = dataclasses.replace(fused, F_cf=tuple(jnp.roll(x, 1, axis=0) for x in fused.F_cf))
        return entrust.Condition(fused, self.projection(fused.F_c, fused.F_u, fused.F_cf, fused.present, evidence.body))


class Deaf(Denoiser):
    """Adds nothing of what noisy values say by themselves."""

    def evidence(self, x_t: Array, log_snr: Array, reach: Array, inside: Array, body: list[Array]) -> Array:
        del log_snr, reach, inside, body
        return jnp.zeros_like(x_t)


class NoOwnEvidence(entrust.EnTrust):
    """Without the exact evidence of noisy values, a voxel's own and its blocks', which holds only if x_t was made from

    the truth.
    """

    denoiser_module = Deaf


def recycled(
    denoise: Callable[[Array, Array], Array], x0: Float[Array, "b *s k"], log_snr: Float[Array, " b"], eps: Array
) -> Float[Array, "b *s k"]:
    """x_t from the model's own one-step prediction instead of the truth (Fu et al. 2023, arXiv 2303.06040).

    The lowest level of a batch is pure noise: a share of its slots always lies there.
    """
    lowest = jnp.full_like(log_snr, jnp.min(log_snr))
    own = jax.lax.stop_gradient(jax.nn.softmax(denoise(eps, lowest), axis=-1))
    size = jnp.max(jnp.abs(x0))
    return schedule.diffuse(size * (2 * own - 1), log_snr, jnp.roll(eps, 1, axis=0))


def with_dice(logits: Array, label: Array, weight: Array) -> Float[Array, " b"]:
    """Cross-entropy plus soft Dice: nnU-Net's habit, which is no proper score."""
    return entrust.weighted_ce(logits, label, weight) + soft_dice(logits, label, (weight > 0).astype(jnp.float32))


def keep_all(
    key: Array, present: Bool[Array, "b m"], space: tuple[int, ...], null: Bool[Array, " b"]
) -> tuple[Float[Array, "b m *s"], Float[Array, " b"]]:
    """No dropout of modalities, regions or conflict features: the model never learns what a missing modality means."""
    del key, null
    b, m = present.shape
    everything = jnp.broadcast_to(present.reshape(b, m, *(1,) * len(space)), (b, m, *space))
    return everything.astype(jnp.float32), jnp.ones((b,))


def hot_noise() -> contextlib.AbstractContextManager:
    """While open, hypotheses are drawn from noise that grows with conflict: the temperature that manufactures doubt."""
    original, noise = sampler.hypothesis, sampler._noise

    def hypothesis(denoise: Any, condition: Any, conflict: Float[Array, "b *s"], *args: Any, **options: Any) -> Array:
        amplitude = 1 + (HOT - 1) * gate(conflict)[..., None]
        with mock.patch.object(sampler, "_noise", lambda *draw: amplitude * noise(*draw)):
            return original(denoise, condition, conflict, *args, **options)

    return mock.patch.object(sampler, "hypothesis", hypothesis)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What differs from the reference, and what theory says of it.

    loss: by stage, arguments of its loss; of: the ablation whose training it uses, when it needs none of its own;
    inputs: those of a calibration head that takes the place of the ladder's choice; question: theory does not say what
    happens, one seed must do.
    """

    expected: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    network: type[entrust.EnTrust] = entrust.EnTrust
    loss: Mapping[str, Mapping[str, Callable]] = dataclasses.field(default_factory=dict)
    of: str = ""
    inputs: tuple[str, ...] = ()
    drawing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    question: bool = False


ABLATIONS: Mapping[str, Ablation] = {
    REFERENCE: Ablation("every check passes"),
    "A1 recycling": Ablation("no diversity at all", network=NoOwnEvidence, loss={"segdiff": {"noisy": recycled}}),
    "A2 cross-entropy and Dice": Ablation("too sure in conflict", loss={"segdiff": {"score": with_dice}}),
    "A8 temperature by conflict": Ablation(
        "hypotheses no longer follow the law", network=HotSampling, of=REFERENCE, drawing=hot_noise
    ),
    "A10 b = 1, four steps": Ablation("hypotheses too sure", config={"diffusion.b": 1.0, "diffusion.steps": 4}),
    "A12 global prior": Ablation("conflict map fails", network=GlobalPrior),
    "no own evidence": Ablation("control of A1: learns it", network=NoOwnEvidence, question=True),
    "full resolution": Ablation(
        "boundaries placed better", config={"model.space_to_depth": 1, "model.widths": (8, 16, 32)}, question=True
    ),
    "A0 mean fusion": Ablation("may lose in conflict", network=MeanFusion, question=True),
    "A3 no conflict features": Ablation("may lose in conflict", network=NoConflictFeatures, question=True),
    "A4 no independence": Ablation("parts depend on each other", network=NoIndependence, question=True),
    "domain term": Ablation("content does not tell its modality", network=DomainTerm, question=True),
    "A5 head sees everything": Ablation("control of A5", of=REFERENCE, inputs=ALL, question=True),
    "A5 head sees entropy alone": Ablation(
        "finds errors worse than the head that sees everything", of=REFERENCE, inputs=("entropy",), question=True
    ),
    "A6 no modality dropout": Ablation(
        "wrong without a modality",
        loss={"enfuse": {"dropout": keep_all}, "segdiff": {"dropout": keep_all}},
        question=True,
    ),
    "A7 divergence as conflict": Ablation(
        "conflict map as good at this base rate", network=DivergenceAsConflict, question=True
    ),
    "A10 b = .07": Ablation(
        "needs more steps", config={"diffusion.b": 0.07, "diffusion.lambda_max": 8.5}, question=True
    ),
    "A11 foreign conflict features": Ablation(
        "worse in conflict", network=ForeignConflict, of=REFERENCE, question=True
    ),
}
