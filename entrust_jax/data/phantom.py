"""A phantom with planted conflict and a posterior in closed form, generated on the fly (ours).

Sites at fixed places of an elliptic body each hold a lesion with probability `prior`, independently: z_j ~
Bern(prior). Reader (modality) m displays evidence s_mj at every site: nothing (0) with probability
ignorance_m, else the truth (+1 for z_j = 1, -1 for z_j = 0) with probability reliability_m and its opposite
otherwise, independently given z_j:

    logit P(z_j = 1 | images) = logit prior + sum_m s_mj ln(reliability_m / (1 - reliability_m))

Two readers may be correlated: a known table of P(each is correct | z_j) then stands in place of the product of their
reliabilities. In the variant 'class' modalities disagree on the class of a lesion, not on its presence: z_j in
{0, 1, 2}; a lesion of class z_j is displayed as its own class with probability reliability_m, else as the other one,
and a site without a lesion is displayed as none. In all variants P(z_j | images) is prior times likelihood,
normalised over the values of z_j; what is silent or absent is left out of the likelihood.

The lesion drawn has radius + delta_j, delta_j uniform on `boundary` and shown by no image: ambiguity of the
boundary, not conflict. P(y_u = k | images) = P(z_j = 1 | images) P(u has class k | delta_j), u in the reach
of site j; sites are independent, all pixels of one site hang together.

Each site carries a faint anatomical ring in EVERY modality: a site where no reader shows anything is still
visible, and so is its exact place. Variants: 'binary' (background, lesion; each modality with its polarity,
gain, bias field and texture), 'class' (the same with lesions of two classes, the second with a core of opposite
contrast) and 'brain' (T1, T1ce, T2, FLAIR; background, NCR, ED, ET; a brain with nested lesions). The joint law of
the label map given the images is in phantom_law, the pictures are made in phantom_scene.

All axes are [D, H, W] = (z, x, y), 1 mm voxels; lengths are in voxels.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from entrust_jax.errors import UserError

CLASSES = {
    "binary": ("background", "lesion"),
    "class": ("background", "lesion1", "lesion2"),
    "brain": ("background", "NCR", "ED", "ET"),
}
VARIANTS = tuple(CLASSES)
BRAIN = ("T1", "T1ce", "T2", "FLAIR")  # the modalities that the variant knows

# Outer radius of each class as a share of the lesion's radius, from the centre outwards; its class index (where lesions
# have classes, that of the first one).
LAYERS = {"binary": ((1.0, 1),), "class": ((1.0, 1),), "brain": ((0.4, 1), (0.7, 3), (1.0, 2))}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a phantom is made of; hashable, hence usable as a static argument of jit.

    size: (H, W); depth: slices D; modalities: names of the readers; sites: number J of candidate sites;
    prior: P(z_j = 1), in the variant 'class' (P(z_j = 1), P(z_j = 2)); reliability, ignorance: one value per
    reader (rho_m in (.5, 1), mu0_m in [0, 1)), of reliability also a tuple with one for each site; radius of a
    lesion; boundary: values of delta; jitter: largest displacement of a site along each axis; snr: contrast over the
    standard deviation of noise and texture, at least 5, so that evidence is readable; correlated: two readers and the
    probability that both are correct, which with their reliabilities fixes the table of correct_table (None: all
    readers are independent).

    Raises UserError where a value makes no sense or the sites do not fit into the body without touching.
    """

    size: tuple[int, int] = (64, 64)
    depth: int = 1
    modalities: tuple[str, ...] = ("A", "B")
    sites: int = 4
    prior: float | tuple[float, ...] = 0.5
    reliability: tuple[float | tuple[float, ...], ...] = (0.95, 0.7)
    ignorance: tuple[float, ...] = (0.1, 0.1)
    radius: float = 5.0
    boundary: tuple[float, ...] = (-1.0, 0.0, 1.0)
    jitter: float = 1.0
    snr: float = 6.0
    variant: str = "binary"
    correlated: tuple[str, str, float] | None = None

    def __post_init__(self):
        for field in ("size", "modalities", "reliability", "ignorance", "boundary", "prior", "correlated"):
            if isinstance(value := getattr(self, field), Iterable):
                object.__setattr__(self, field, tuple(value))  # lists are not hashable
        count = len(self.modalities)
        if self.variant not in VARIANTS:
            raise _mistake("variant", f"is {self.variant!r}: choose one of {', '.join(VARIANTS)}")
        if unknown := [m for m in self.modalities if self.variant == "brain" and m not in BRAIN]:
            raise _mistake("modalities", f"has {unknown[0]!r}: the brain variant knows {', '.join(BRAIN)}")
        if not len(self.reliability) == len(self.ignorance) == count > 0:
            raise _mistake("reliability", f"and ignorance need one value for each of the {count} modalities")
        for own in self.reliability:
            if isinstance(own, tuple) and len(own) != self.sites:
                raise _mistake("reliability", f"is {self.reliability}: give a reader one value, or one for each site")
            if not all(0.5 < r < 1 for r in (own if isinstance(own, tuple) else (own,))):
                raise _mistake("reliability", f"is {self.reliability}: every value must lie between .5 and 1")
        if not all(0 <= q < 1 for q in self.ignorance):
            raise _mistake("ignorance", f"is {self.ignorance}: every value must lie in [0, 1)")
        shares = self.prior if isinstance(self.prior, tuple) else (self.prior,)
        if len(shares) != self.values - 1:
            raise _mistake("prior", f"is {self.prior}: the variant {self.variant} needs {self.values - 1}")
        if not (min(shares) > 0 and sum(shares) < 1):
            raise _mistake("prior", f"is {self.prior}: it must lie between 0 and 1, and so must its sum")
        if self.correlated is not None:
            _check_correlated(self)
        if self.snr < 5:
            raise _mistake("snr", f"is {self.snr}: below 5 the evidence is not readable and the posterior not exact")
        if self.sites < 1 or not self.boundary or self.depth < 1:
            raise _mistake("sites, boundary, depth", "must not be empty")
        inner = max((share for share, _ in LAYERS[self.variant] if share < 1), default=0.0)
        if self.radius + min(self.boundary) <= inner * self.radius:
            raise _mistake("radius", f"{self.radius:g} is too small for a boundary of {self.boundary}; make it larger")
        _check_fit(self)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, background first."""
        return CLASSES[self.variant]

    @property
    def values(self) -> int:
        """Number of values of z_j: 2 (no lesion, lesion), or 3 where lesions have classes."""
        return 3 if self.variant == "class" else 2


def _mistake(key: str, what: str) -> UserError:
    return UserError(f"data.phantom.{key} {what}")


def _check_correlated(spec: Spec) -> None:
    value = spec.correlated
    if any(isinstance(own, tuple) for own in spec.reliability):
        raise _mistake("correlated", "readers whose reliability differs by site must be independent")
    if value is None or len(value) != 3 or value[0] == value[1] or not {*value[:2]} <= {*spec.modalities}:
        raise _mistake("correlated", f"is {value}: give two of {', '.join(spec.modalities)} and P(both are correct)")
    table = correct_table(spec)
    if table.min() <= 0:
        first, second = table[0].sum(), table[:, 0].sum()
        raise _mistake(
            "correlated",
            f"is {value}: readers of reliability {first:g} and {second:g} are both correct with a probability between"
            f" {first + second - 1:g} and {min(first, second):g}",
        )


# --- the law ------------------------------------------------------------------------------------------------


def correct_table(spec: Spec) -> Float[np.ndarray, "2 2"]:
    """P(each of the two correlated readers is correct | z_j): rows the first (correct, wrong), columns the second.

    Its margins are the reliabilities, so that one number, P(both are correct), gives all four. Raises ValueError where
    no readers are correlated.
    """
    if spec.correlated is None:
        raise ValueError("no readers are correlated")
    both = spec.correlated[2]
    first, second = (float(reliabilities(spec)[m, 0]) for m in _pair(spec))
    return np.array([[both, first - both], [second - both, 1 - first - second + both]])


def _pair(spec: Spec) -> tuple[int, ...]:
    """Indices of the two correlated readers, () where there are none."""
    return tuple(spec.modalities.index(name) for name in spec.correlated[:2]) if spec.correlated else ()


def prior(spec: Spec) -> Float[np.ndarray, " z"]:
    """P(z_j = z) for every value of z_j."""
    shares = spec.prior if isinstance(spec.prior, tuple) else (spec.prior,)
    return np.array([1 - sum(shares), *shares])


def reliabilities(spec: Spec) -> Float[np.ndarray, "m j"]:
    """rho of every reader at every site."""
    return np.stack([np.broadcast_to(np.asarray(own, float), (spec.sites,)) for own in spec.reliability])


def draw_evidence(key: PRNGKeyArray, spec: Spec) -> tuple[Bool[Array, " j"] | Int[Array, " j"], Int[Array, "m j"]]:
    """(z, s): the truth of every site and what every reader displays there."""
    count = len(spec.modalities)
    draws = jax.random.uniform(key, (1 + 2 * count, spec.sites))
    silent = draws[1 : 1 + count] < jnp.asarray(spec.ignorance)[:, None]
    correct = draws[1 + count :] < jnp.asarray(reliabilities(spec), jnp.float32)
    if pair := _pair(spec):
        first, second = pair
        table = correct_table(spec)
        chance = jnp.where(correct[first], *(table[:, 0] / table.sum(1)))
        correct = correct.at[second].set(draws[1 + count + second] < chance)
    if spec.variant == "class":
        _, one, two = prior(spec)
        truth = jnp.where(draws[0] < one, 1, jnp.where(draws[0] < one + two, 2, 0)).astype(jnp.int32)
        said = jnp.where(truth[None] == 0, -1, jnp.where(correct, truth[None], 3 - truth[None]))
    else:
        truth = draws[0] < float(prior(spec)[1])
        said = jnp.where(correct == truth[None], 1, -1)
    return truth, jnp.where(silent, 0, said).astype(jnp.int32)


def _reading_laws(spec: Spec) -> tuple[Float[np.ndarray, "m j e z"], Float[np.ndarray, "e e z"]]:
    """P(a reader displays e | z, it displays something) at every site (a single one where all are alike), and for the
    correlated pair the ratio of the joint probability of two displays to their product; e = -1, 0, 1 (2). What is not
    displayed has probability 1."""
    called = np.array([-1, *range(1, spec.values)])  # what a correct reader displays for each z
    display = np.arange(-1, spec.values)[:, None]
    varies = any(isinstance(own, tuple) for own in spec.reliability)
    rho = np.repeat(reliabilities(spec)[:, : None if varies else 1, None, None], spec.values, axis=-1)
    right = display == called
    wrong = (display != 0) & ~right
    if spec.variant == "class":
        rho[..., 0] = 1.0  # all see that nothing is there
        wrong &= display > 0
    single = np.where(display == 0, 1.0, right * rho + wrong * (1 - rho))
    ratio = np.ones((len(display), len(display), spec.values))
    if pair := _pair(spec):
        table = correct_table(spec)
        cell = np.where(right, 0, 1)
        both = (table / np.outer(table.sum(1), table.sum(0)))[cell[:, None], cell[None]]
        shown = (display != 0)[:, None] & (display != 0)[None]
        ratio = np.where(shown & np.all(rho[list(pair), 0] < 1, axis=0), both, 1.0)
    return single, ratio


def log_likelihood(evidence: Int[Array, "m *j"], present: Bool[Array, " m"], spec: Spec) -> Float[Array, "*j z"]:
    """ln P(what the present modalities display | z_j = z, which of them display something), -inf for what cannot be.

    Whether a reader displays anything does not depend on z_j, so that this is all that bears on it.
    """
    single, ratio = _reading_laws(spec)
    with np.errstate(divide="ignore"):
        single, ratio = np.log(single), np.log(ratio)
    row = jnp.where(present.reshape(present.shape + (1,) * (evidence.ndim - 1)), evidence, 0) + 1
    places = single.shape[1]
    if places > 1 and evidence.shape[-1] != places:
        raise ValueError(f"readers differ by site: the last axis of the evidence must be the {places} sites")
    site = jnp.arange(places) if places > 1 else 0
    total = sum(jnp.asarray(law, jnp.float32)[site, row[m]] for m, law in enumerate(single))
    if pair := _pair(spec):
        total = total + jnp.asarray(ratio, jnp.float32)[row[pair[0]], row[pair[1]]]
    return jnp.asarray(total)


def belief(evidence: Int[Array, "m *j"], present: Bool[Array, " m"], spec: Spec) -> Float[Array, "*j z"]:
    """P(z_j = z | the present modalities), by Bayes' rule; absent and silent readers are summed out."""
    said = log_likelihood(evidence, present, spec)
    odds = jnp.asarray(np.log(prior(spec)), jnp.float32).reshape((1,) * (said.ndim - 1) + (-1,))
    return jax.nn.softmax(odds + said)


def posterior(evidence: Int[Array, "m *j"], present: Bool[Array, " m"], spec: Spec) -> Float[Array, "*j"]:
    """P(a lesion is there | the present modalities). With independent readers and one class of lesion its logit is
    logit prior + sum of s_mj ln(rho_m / (1 - rho_m))."""
    return belief(evidence, present, spec)[..., 1:].sum(-1)


def lesion_classes(distance: Float[Array, "*s"], delta: Float[Array, "*s"] | float, spec: Spec) -> Int[Array, "*s"]:
    """Class index at a distance from the centre of a lesion with z_j = 1, 0 beyond radius + delta; times z_j
    it is that of any lesion.

    Inner layers end at fixed shares of `radius`: delta moves the outer border alone.
    """
    result = jnp.zeros(distance.shape, jnp.int32)
    for share, index in reversed(LAYERS[spec.variant]):
        result = jnp.where(distance <= share * spec.radius + (delta if share == 1 else 0), index, result)
    return result


def occupancy(distance: Float[Array, "*s"], spec: Spec, truth: int = 1) -> Float[Array, "*s k"]:
    """P(class k at this distance | z_j = truth): the mean over delta."""
    layers = [lesion_classes(distance, delta, spec) * truth for delta in spec.boundary]
    return jnp.mean(jnp.stack([jax.nn.one_hot(layer, len(spec.classes)) for layer in layers]), axis=0)


def marginal(
    site: Int[Array, "*s"],
    distance: Float[Array, "*s"],
    posterior: Float[Array, " j"] | Float[Array, "j z"],
    spec: Spec,
) -> Float[Array, "*s k"]:
    """P(y_u = k | images) from the sites' P(z_j = 1), or from their P(z_j = z) as belief(evidence, present) gives it
    for any subset of modalities.

    Raises ValueError for P(z_j = 1) alone where lesions have classes.
    """
    if posterior.ndim == 1 and spec.values > 2:
        raise ValueError("lesions of several classes: give P(z_j = z), of shape [j z]")
    lesions = posterior[:, None] if posterior.ndim == 1 else posterior[:, 1:]
    there = jnp.where((site >= 0)[..., None], lesions[jnp.maximum(site, 0)], 0.0)
    nothing = jax.nn.one_hot(jnp.zeros_like(site), len(spec.classes))
    result = (1 - there.sum(-1, keepdims=True)) * nothing
    for z in range(1, spec.values):
        result = result + there[..., z - 1, None] * occupancy(distance, spec, z)
    return result


def opposed(evidence: Int[Array, "m *j"], present: Bool[Array, " m"]) -> Bool[Array, "*j"]:
    """Sites where two present readers contradict each other: they display different things."""
    shown = (evidence != 0) & present.reshape(present.shape + (1,) * (evidence.ndim - 1))
    limit = jnp.iinfo(evidence.dtype).max
    highest = jnp.max(jnp.where(shown, evidence, -limit), axis=0)
    return highest > jnp.min(jnp.where(shown, evidence, limit), axis=0)


def silent(evidence: Int[Array, "m *j"], present: Bool[Array, " m"]) -> Bool[Array, "*j"]:
    """Sites where a present reader shows nothing and no two contradict each other."""
    there = present.reshape(present.shape + (1,) * (evidence.ndim - 1))
    return jnp.any((evidence == 0) & there, axis=0) & ~opposed(evidence, present)


def wrong(evidence: Int[Array, "m *j"], truth: Bool[Array, "*j"] | Int[Array, "*j"]) -> Bool[Array, "m *j"]:
    """Readers that display something else than the truth z_j; one that shows nothing is not wrong."""
    return (evidence != 0) & (evidence != jnp.where(truth == 0, -1, truth)[None])


# --- geometry -----------------------------------------------------------------------------------------------


def semi_axes(spec: Spec) -> np.ndarray:
    """Semi-axes of the mean body along D, H, W. Few slices are the middle of the body, many hold all of
    it."""
    h, w = spec.size
    return np.array([max(0.55 * spec.depth, 0.43 * min(h, w)), 0.43 * h, 0.46 * w])


def mean_centres(spec: Spec, semi: Array | np.ndarray) -> Float[Array, "j 3"]:
    """Mean centres of the sites: on a ring in the body's plane, alternately above and below the middle
    slice."""
    angle = 2 * np.pi * (np.arange(spec.sites) + 0.5) / spec.sites
    height = 0.15 * (spec.depth - 1) * (-1.0) ** np.arange(spec.sites)
    plane = jnp.asarray(0.54 * np.stack([np.cos(angle), np.sin(angle)], -1), jnp.float32)
    return jnp.concatenate([jnp.asarray(height, jnp.float32)[:, None], plane * jnp.asarray(semi)[None, 1:]], axis=1)


def reach(spec: Spec) -> float:
    """Radius of the widest lesion."""
    return spec.radius + max(spec.boundary)


def _check_fit(spec: Spec) -> None:
    """Wherever jitter puts them, the widest lesions neither touch each other nor leave the smallest body."""
    semi = 0.96 * semi_axes(spec)
    with jax.ensure_compile_time_eval():
        centres = np.asarray(mean_centres(spec, semi))
    outer = reach(spec) + 0.5 + math.sqrt(2) * spec.jitter
    apart = np.linalg.norm((centres[:, None] - centres[None])[..., 1:], axis=-1)
    apart[np.diag_indices(spec.sites)] = np.inf
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    edges = []
    for height in np.arange(spec.depth) - (spec.depth - 1) / 2:
        section = np.sqrt(np.maximum(outer**2 - (height - centres[:, 0]) ** 2, 0))[:, None, None]
        circle = centres[:, None, 1:] + section * np.stack([np.cos(turn), np.sin(turn)], -1)
        cut = np.where(section[..., 0] > 0, np.square(circle / semi[1:]).sum(-1) + (height / semi[0]) ** 2, 0)
        edges.append(cut.max())
    if apart.min() < 2 * outer or max(edges) > 1:
        raise _mistake(
            "radius",
            f"{spec.radius:g}: {spec.sites} sites do not fit into {spec.size[0]} x {spec.size[1]} without"
            " touching; make radius, jitter or sites smaller or size larger",
        )
