"""Typed configuration: YAML files and ``--set dotted.key=value``, validated on loading.

``Config`` is the tree that every job loads; each consumer receives only the section it needs.
Unknown keys are rejected, with the nearest known key as a suggestion.
"""

import re
from contextlib import suppress
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from brainray.errors import ConfigError
from brainray.redaction import redacted

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]  # 0 included
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as NumPy and scikit-learn accept
AtLeastTwo = Annotated[int, Field(ge=2)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]  # 0 included
Side = Annotated[int, Field(ge=16, le=2048)]  # of slices, in pixels

PretextName = Literal["none", "rotation", "contrastive"]


def _typed(value: Any) -> Any:
    """Text as the boolean or number that it reads as: a search has no field to give it a type."""
    if not isinstance(value, str):
        return value
    for number in (int, float):
        with suppress(ValueError):
            return number(value)
    return {"true": True, "false": False}.get(value.lower(), value)


SearchKind = Literal["choice", "uniform", "log_uniform", "integer"]
SEARCH_KINDS = get_args(SearchKind)
SearchValue = Annotated[Any, BeforeValidator(_typed)]
SearchDomain = dict[SearchKind, list[SearchValue]]
SearchSpace = dict[str, SearchDomain]

WEIGHTS_OF_NO_SLICE = ("random", "imagenet")
"""Names of starting weights not trained on any MRI slice; all others are paths or runs."""

RUN_PREFIX = "run:"
"""Before the name of a run whose encoder gives a study's feature its weights."""

URI_VARIABLE = "MLFLOW_TRACKING_URI"
"""MLflow's own variable; it takes precedence over ``tracking.uri``."""

ClustererName = Literal[
    "kmeans", "gmm", "agglomerative", "agglomerative_depth", "dbscan", "spectral", "hdbscan"
]

_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _check_plain_name(value: str) -> str:
    if not _NAME_PATTERN.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a plain name: use up to 100 letters, digits, '.', '_' and '-'"
        )
    return value


PlainName = Annotated[str, AfterValidator(_check_plain_name)]
"""The name of a folder in ``storage``: no path separators."""


def _without_secret(uri: str) -> str:
    if "://" in uri and redacted(uri) != uri:
        raise ValueError(
            f"{redacted(uri)} contains a password or key: set it in the environment (for example "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), not in the URI, which is saved with "
            "the results and logged"
        )
    return uri


Location = Annotated[str, AfterValidator(_without_secret)]
"""A path or URI that is saved with results and logged, so it must not contain a secret."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_unset(cls, values: Any) -> Any:
        """A section whose keys are all commented out is null in YAML."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {
            key: value
            for key, value in values.items()
            if value is not None or not isinstance(defaults.get(key), BaseModel | dict)
        }


class ClassesConfig(_Section):
    map: dict[str, str | None] = {}
    """New names for class folders or label values, for example ``glioma_tumor: glioma``; null
    removes the label: its slices are unlabelled in training and excluded from evaluation.
    """


class NearDuplicateConfig(_Section):
    similarity: Fraction = 0.996
    """Minimum similarity, after alignment, at which two slices count as copies."""
    turned_similarity: Fraction = 0.997
    """The same for mirrored or rotated copies; stricter, because heads are nearly symmetric."""
    num_candidates: Positive = 16
    """Candidates per slice, with the most similar descriptors, whose pixels are compared."""
    num_turned_candidates: Positive = 4
    """The same for the seven other orientations together. Of each orientation, up to this many more
    whose descriptors are nearly equal are compared as well."""
    descriptor_similarity: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.7
    """Minimum cosine similarity between a slice's descriptor and a candidate's."""


class SubjectConfig(_Section):
    estimate: bool = True
    """Estimate by image similarity which slices belong to one subject, for slices whose subject is
    not given by a labels table, a DICOM header or a volume file."""
    same_view_similarity: Fraction = 0.95
    """Similarity at or above which two slices count as the same view."""
    link_similarity: Fraction = 0.7
    """Minimum similarity at which two slices count as likely of one subject."""
    group_similarity: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.2
    """Minimum mean similarity between the views of two groups for a link to merge them."""
    num_neighbours: Positive = 2
    """Two views are linked only if each is among this many nearest neighbours of the other (a
    slice has one neighbour on each side)."""
    max_slices: Positive = 40
    """Maximum number of views per group (copies and flips count once); prevents chains across
    subjects."""


class VolumeConfig(_Section):
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """Plane in which NIfTI volumes are sliced."""
    window_low: Annotated[float, Field(ge=0.0, lt=50.0)] = 0.5
    """Intensity percentile mapped to black if the file specifies no window."""
    window_high: Annotated[float, Field(gt=50.0, le=100.0)] = 99.5
    """Intensity percentile mapped to white if the file specifies no window."""
    min_foreground: BelowOne = 0.05
    """Volume slices in which the head covers a smaller share of the area are skipped as empty."""
    max_voxels: Positive = 1_000_000_000
    """Files with more voxels (in all volumes, frames or pages together), according to their header,
    are rejected before decoding."""


class PreprocessConfig(_Section):
    image_size: Side = 256
    """Height and width of the stored slices, in pixels."""
    skull_strip: Literal["otsu", "intracranial", "none"] = "otsu"
    """``otsu`` (METHOD A) removes little more than the background; ``intracranial`` also removes
    skull, scalp, eyes and face, and falls back to ``otsu`` for slices with low confidence."""
    frame: Literal["keep", "remove"] = "keep"
    """``remove`` deletes a white border, bar or page around the head, as found in screenshots,
    before the skull strip, which would otherwise mistake it for the head."""
    crop: Literal["none", "foreground"] = "none"
    """``foreground`` crops each slice to the bounding box of the skull-strip mask (of the ``otsu``
    mask if there is none), so that heads fill the slice whatever the field of view."""
    resize: Literal["stretch", "letterbox"] = "stretch"
    """``stretch`` fills the square (METHOD A); ``letterbox`` keeps the aspect ratio (METHOD B)."""
    intensity: Literal["as_is", "min_max"] = "as_is"
    """``min_max`` stretches each slice's intensities to 0..255 before storing it (METHOD B)."""
    min_side: Positive = 32
    """Slices with a shorter height or width, in pixels, are rejected; so are those with one side
    more than ten times the other."""
    max_pixels: Positive = 64_000_000
    """Files whose slices have more pixels, according to their header, are rejected before
    decoding."""
    min_intensity_std: NonNegative = 2.0
    """Slices with a smaller standard deviation of intensities (0..255) are rejected as blank."""
    max_rejected_fraction: Share = 0.5
    """The job fails when a larger share of the files is rejected."""
    near_duplicate: NearDuplicateConfig = NearDuplicateConfig()
    subject: SubjectConfig = SubjectConfig()
    volume: VolumeConfig = VolumeConfig()
    files_per_task: Count = 0
    """Files that one Ray Data task decodes, fewer if they are large (64 MiB in total). 0 uses 1,024
    to 16 files per task, with smaller tasks towards the end."""


class SplitConfig(_Section):
    mode: Literal["official", "grouped", "purge"] = "official"
    """``official`` keeps the source's Training and Testing folders, or draws a split if it has
    none; ``grouped`` always draws, keeping duplicates and slices of one subject on the same side
    and, since subjects are recognised in part only, taking stretches of successively numbered
    files; ``purge`` keeps the folders and drops training slices with a duplicate, mirrored and
    rotated ones included, among the test slices."""
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of each class, and of the unlabelled slices, held out for testing when the split is
    drawn. Held-out slices without a label are neither learned from nor scored."""
    seed: int = 0
    """Seed of the drawn split and of the label draw."""
    labelled_fraction: Fraction = 0.2
    """Share of the labelled training slices whose label may be read, drawn when training starts. 1
    reads every available label."""
    validation_fraction: Annotated[float, Field(ge=0.001, le=0.5)] = 0.15
    """Share of the label draw held out for choosing the epoch: 1/n of its groups of slices, so that
    .15 is one in seven. Shares that are far from 1/n are refused."""
    validation: Literal["slice", "subject"] = "slice"
    """What is held out for validation. ``slice``: slices with their copies; other slices of the
    same subject may be trained on unless metadata gives the subject. ``subject``: whole subjects
    (given or estimated), otherwise used only by a warm-up without labels; closer to the performance
    on new subjects, but leaves less to train on."""


class EncoderConfig(_Section):
    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    """Torchvision encoder, without its last layer."""
    weights: Location = "random"
    """``random``, ``imagenet`` (downloaded by torchvision) or the path of a local state dict or
    brainray checkpoint."""
    pretext: PretextName = "none"
    """Warm-up: pretext task on which the encoder is trained without labels, on all training slices,
    before training starts (see ``self_supervision``). Runs on one store share the warm-up if they
    also have the same ``seed``, ``train.weight_decay``, ``train.warmup_fraction`` and
    ``train.precision``."""
    pretext_image_size: Side = 64
    """Height and width of the slices in the warm-up, in pixels."""


_POLICIES: dict[str, dict[str, float]] = {
    "published": {},
    "none": {
        "horizontal_flip": 0.0,
        "vertical_flip": 0.0,
        "rotation_probability": 0.0,
        "max_zoom": 0.0,
        "max_intensity_shift": 0.0,
    },
    "weak": {
        "vertical_flip": 0.0,
        "max_rotation_deg": 20.0,
        "max_shift": 0.05,
    },
    "strong": {
        "vertical_flip": 0.0,
        "rotation_probability": 0.8,
        "max_rotation_deg": 45.0,
        "max_zoom": 0.25,
        "max_shift": 0.1,
        "max_intensity_shift": 0.2,
        "max_log_gamma": 0.4,
        "bias_field": 0.3,
        "max_noise_std": 0.05,
        "max_blur_sigma": 1.0,
        "cutout_probability": 0.5,
    },
}


class AugmentConfig(_Section):
    policy: Literal["published", "none", "weak", "strong"] = "published"
    """Preset for the strengths that are not set explicitly: METHOD A's augmentations, none, a few
    weak ones, or all but tone curves and up-down flips."""
    horizontal_flip: Share = 0.5
    """Probability of a left-right flip."""
    vertical_flip: Share = 0.1
    """Probability of an up-down flip."""
    rotation_probability: Share = 0.5
    """Probability of a rotation."""
    max_rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 90.0
    """Maximum rotation in either direction; small angles are more frequent (half are below an
    eighth of it)."""
    max_zoom: BelowOne = 0.1
    """Zoom factors are uniform in 1 +- this value."""
    max_intensity_shift: BelowOne = 0.1
    """Maximum contrast change and brightness offset, in units of [0, 1] intensity."""
    max_shift: BelowOne = 0.0
    """Shifts along either axis are uniform in +- this share of the side."""
    max_log_gamma: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    """Intensities are raised to the power exp(g), with g uniform in +- this value."""
    intensity_curve: Share = 0.0
    """Strength of a random tone curve that imitates a different contrast or export: intensities are
    multiplied by a factor whose logarithm is a sum of cosines of the intensity, with weights of
    this standard deviation (1/k of it for the k-th term)."""
    bias_field: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    """Standard deviation of the logarithm of a smooth multiplicative field, which imitates the
    uneven sensitivity of a receive coil."""
    max_noise_std: BelowOne = 0.0
    """Standard deviation of Gaussian noise is uniform between 0 and this, in units of [0, 1]."""
    max_blur_sigma: Annotated[float, Field(ge=0.0, le=3.0)] = 0.0
    """Sigma of Gaussian blur is uniform between 0 and this, in pixels."""
    cutout_probability: Share = 0.0
    """Probability that a square is blacked out (DeVries & Taylor 2017)."""
    max_cutout: BelowOne = 0.3
    """Side of the square is uniform between 0 and this share of the slice's side."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_policy(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        policy = values.get("policy", "published")
        return (_POLICIES.get(policy, {}) if isinstance(policy, str) else {}) | values

    @property
    def changes_nothing(self) -> bool:
        """Whether slices pass through unchanged."""
        strengths = self.model_dump(exclude={"policy"})
        return strengths == AugmentConfig(policy="none").model_dump(exclude={"policy"})


def _of_policy(default: str) -> BeforeValidator:
    """Default policy of a section that sets strengths without one, instead of AugmentConfig's."""

    def fill(values: Any) -> Any:
        return {"policy": default} | values if isinstance(values, dict) else values

    return BeforeValidator(fill)


class ObjectiveConfig(_Section):
    name: Literal["joint", "supervised", "consistency", "prototype", "anchored"] = "joint"
    """``joint`` is METHOD A's; ``supervised`` is its control, with cross entropy on labelled slices
    only; ``consistency`` trains on confident pseudo-labels, ``prototype`` on assignments to the
    mixture's means, ``anchored`` on both."""
    lambda_cluster: NonNegative = 0.5
    """Weight of the clustering term."""
    lambda_consistency: NonNegative = 1.0
    """Weight of the cross entropy on pseudo-labels."""
    temperature: PositiveFloat = 0.1
    """Temperature of the softmax over cosines to the prototypes; lower is sharper."""
    ramp_epochs: Count = 5
    """Epochs over which the weight of pseudo-labels and prototype assignments is ramped up."""
    inherit_labels: Literal["none", "subject"] = "none"
    """With ``subject``, unlabelled slices of an estimated subject take the most frequent label of
    its labelled slices as pseudo-label instead of the teacher's, unless they are copies of a
    validation slice in another orientation. Used by ``consistency`` and
    ``anchored``."""

    @property
    def learns_pseudo_labels(self) -> bool:
        """Whether the loss depends on the pseudo-labels, which may be inherited."""
        return self.name in ("consistency", "anchored")


class ClusteringConfig(_Section):
    num_clusters: AtLeastTwo = 4
    """Number of clusters, K."""
    pca_dim: Positive = 32
    """Dimensions of the PCA space in which the mixture is fitted; at most those of the embedding.
    """
    covariance_type: Literal["spherical", "diag", "tied", "full"] = "full"
    """Shape of the mixture's components."""
    kmeans_max_iter: Positive = 100
    """Maximum number of Lloyd iterations."""
    gmm_max_iter: Positive = 100
    """Maximum number of EM iterations."""
    gmm_tol: PositiveFloat = 1e-3
    """EM stops when the mean log-likelihood improves by less than this."""
    reg_covar: PositiveFloat = 1e-6
    """Added to the diagonal of the covariances."""
    anchors: Literal["none", "labelled"] = "none"
    """``labelled`` restricts each labelled slice to the clusters of its class while the mixture is
    fitted; ``none`` clusters without labels, as METHOD A does."""
    max_cluster_share: Fraction = 0.99
    """A cluster with a larger share of the slices counts as a collapse."""
    min_spread: NonNegative = 1e-4
    """A smaller mean squared distance of the normalised embeddings to their mean counts as a
    collapse."""
    on_collapse: Literal["stop", "reseed", "warn"] = "stop"
    """``stop`` ends the run; ``reseed`` refits the epoch's clusters without those of the last epoch
    (K-means from a new seed or, with anchors and as many clusters as classes, the class means) and
    stops if that does not help; ``warn`` logs the collapse and continues if clusters could be
    fitted at all."""


class TrainConfig(_Section):
    image_size: Side = 256
    """Height and width at which the encoder sees the slices, in pixels."""
    growth_epochs: Count = 0
    """Epochs of progressive resizing, in which slices grow from ``start_image_size`` in steps of 32
    pixels; the epoch used for prediction is chosen among the later ones. 0: always ``image_size``.
    """
    start_image_size: Side = 64
    """Height and width in the first of the ``growth_epochs``."""
    num_epochs: Positive = 20
    """An epoch is one pass over the unlabelled slices, or the labelled ones if these are more; the
    others cycle."""
    num_workers: Count = 0
    """Number of DDP ranks; 0 uses every GPU of the Ray cluster, or one CPU worker without GPUs."""
    min_workers: Count = 0
    """Minimum number of ranks to start with, or to continue with when nodes are lost; more join, up
    to ``num_workers``, when nodes appear (checked once a minute; the current epoch, or round of
    refinement, restarts). 0: always ``num_workers``."""
    cpus_per_worker: Count = 0
    """CPUs (and threads) per worker; 0 divides the CPUs of the Ray cluster among the workers."""
    gpus_per_worker: Fraction = 1.0
    """Share of a GPU reserved per worker when training on GPUs; trials of a sweep may share one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses CUDA if the Ray cluster has GPUs."""
    batch_size_per_worker: Positive = 64
    """Unlabelled slices per step and worker."""
    labelled_batch_size_per_worker: Positive = 64
    """Labelled slices per step and worker."""
    embed_batch_size: Positive = 256
    """Slices per inference batch."""
    learning_rate: PositiveFloat = 1.5e-3
    """Peak learning rate of the one-cycle schedule (AdamW)."""
    weight_decay: NonNegative = 0.05
    """AdamW's decoupled weight decay."""
    ema_decay: BelowOne = 0.0
    """Decay of the exponential moving average of the weights that is used for embedding, evaluation
    and checkpoints (its batch statistics are measured on slices, half of them augmented like
    the unlabelled ones); 0 uses the trained weights. It is per batch of one worker: an update with
    the batches of n workers decays by its n-th power (Busbridge et al. 2023), so that the average
    spans as many epochs."""
    mixup_alpha: NonNegative = 0.0
    """Parameter of the Beta distribution for mixup of labelled slices and their labels; 0 disables
    mixup."""
    warmup_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the steps during which the learning rate rises."""
    accumulation_steps: Positive = 1
    """Batches whose gradients are averaged for one optimiser step."""
    compile: bool = False
    """Compile the encoder with torch.compile: adds minutes at the start, faster steps on a GPU."""
    cache_gib: Annotated[float, Field(ge=0.0, le=1e6)] = 4.0
    """Slices kept in each worker's device memory, in GiB; the rest is streamed from a file on its
    node. (A warm-up keeps all of its smaller slices in memory.)"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto`` uses bf16 autocast if the hardware supports it, otherwise fp32; in prediction it is
    the run's own setting. On a GPU,
    convolutions in fp32 multiply in TF32 where it has that, which is PyTorch's default."""
    wait_for_nodes: bool = False
    """Wait for an autoscaler to add missing resources instead of failing at the start; for training
    also set ``num_workers``, ``cpus_per_worker`` and ``device``. Nodes that are lost later are
    always waited for."""
    max_failures: Count = 2
    """Number of times lost workers are replaced before the job fails."""
    collective_timeout_s: Annotated[int, Field(ge=1, le=10**7)] = 1800
    """Seconds that a worker waits for the others in a collective before it fails."""


TRAINING_SECTIONS = (
    "split",
    "encoder",
    "self_supervision",
    "augment",
    "augment_unlabelled",
    "objective",
    "clustering",
    "train",
    "evaluation",
    "tracking",
)
"""Sections that training on an image store reads."""

WORKER_SETTINGS = (
    "num_workers",
    "min_workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "device",
    "wait_for_nodes",
    "max_failures",
    "collective_timeout_s",
)
"""Settings of ``train`` for the placement and number of workers, which may change when a run
resumes. Only the number affects what is learned: a step has a batch of every worker.
"""

WORKER_KEYS = tuple(f"train.{name}" for name in WORKER_SETTINGS)


class EvaluationConfig(_Section):
    test_each_epoch: bool = True
    """Evaluate the test slices after every epoch, as METHOD A reports, or only once, after
    training, with the chosen and the last one. Test metrics never select anything."""
    tsne_epochs: tuple[int, ...] = (1, 5, 10, 15, 20)
    """Epochs whose embeddings are saved and plotted as t-SNE maps, beside that of the chosen one;
    only the last can be, unless test slices are evaluated after every epoch."""
    tsne_max_slices: Positive = 2000
    """Maximum number of slices on a t-SNE map, and of those that the report shows as pictures; its
    counts are of all slices."""
    control: str | None = None
    """Name of the run to compare with in the report; with ``num_label_draws``, its name without
    ``-drawI``."""
    num_label_draws: Positive = 1
    """Number of label draws, each trained as a run ``NAME-drawI`` with split seeds counted up from
    ``split.seed``; their metrics are compared with the control's draw by draw."""
    siblings: tuple[str, ...] = ()
    """Names of runs on the same store that differ in ``seed``: the report shows which of this run's
    sub-types (several clusters of one class) they also find."""
    bootstrap_resamples: Annotated[int, Field(ge=10)] = 1000
    """Number of bootstrap resamples for each confidence interval."""


class TrackingConfig(_Section):
    uri: str | None = None
    """MLflow tracking URI, overridden by ``MLFLOW_TRACKING_URI``; defaults to ``mlflow.db`` in a
    local ``storage``, otherwise in ``~/brainray`` on the machine that runs the job. A password in
    it is not saved with the results."""
    experiment: str = "brainray"
    """MLflow experiment; created if it does not exist."""

    @field_validator("uri")
    @classmethod
    def _has_a_scheme(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"[\w.-]+:\d+", value):
            raise ValueError(f"{value!r} has no scheme: write http://{value}")
        return value


VALIDATION_METRICS = {
    "validation/score": "max",
    "validation/head/accuracy": "max",
    "validation/head/balanced_accuracy": "max",
    "validation/cluster/accuracy": "max",
    "validation/loss": "min",
    "validation/calibration_error": "min",
}
"""Metrics of every epoch (`engine.selection`) by which trials can be compared, and which extreme is
best.
"""


class TuneConfig(_Section):
    space: SearchSpace = {}
    """For each dotted config key, either ``choice: [...]``, or ``uniform``, ``log_uniform`` or
    ``integer`` with ``[low, high]``."""
    algorithm: Literal["random", "grid", "optuna"] = "random"
    """``grid`` tries every combination of choices; ``optuna`` learns from finished trials (TPE)."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """How poor trials are stopped early: successive halving, the median rule, or not at all."""
    num_trials: Positive = 16
    """Trials in the whole sweep, including resumed ones; ignored by ``grid``, which runs one per
    combination."""
    metric: str = "validation/score"
    """Validation metric by which trials are compared; test metrics are rejected."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller ``metric`` is better."""
    min_epochs: Positive = 2
    """Epochs that every trial trains for before it may be stopped."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """Successive halving keeps one in this many trials at each rung."""
    max_concurrent_trials: Count = 0
    """Trials that run at a time; 0 runs as many as fit on the Ray cluster when the sweep starts.
    Where an autoscaler adds nodes later, give the number."""
    time_budget_min: PositiveFloat | None = None
    """Minutes of search, over all submissions, after which all trials stop and the sweep is
    complete."""

    @field_validator("space", mode="before")
    @classmethod
    def _kinds_are_known(cls, value: Any) -> Any:
        for key, domain in value.items() if isinstance(value, dict) else ():
            if not isinstance(domain, dict) or not domain.keys() <= set(SEARCH_KINDS):
                raise ValueError(f"{key} needs one of {', '.join(SEARCH_KINDS)}, not {domain!r}")
        return value

    @field_validator("metric")
    @classmethod
    def _is_of_validation(cls, value: str) -> str:
        if not value.startswith("validation/"):
            raise ValueError(
                f"{value!r} is not a validation metric: selecting by test metrics would fit the "
                "sweep to the test slices; use one under validation/, such as validation/score"
            )
        if value not in VALIDATION_METRICS:
            raise ValueError(
                f"{value!r} is not reported after an epoch: use one of "
                f"{', '.join(VALIDATION_METRICS)}"
            )
        return value

    @model_validator(mode="after")
    def _mode_fits_the_metric(self) -> "TuneConfig":
        wanted = VALIDATION_METRICS[self.metric]
        if self.mode != wanted:
            raise ValueError(f"{self.metric} is best at its {wanted}: set tune.mode={wanted}")
        return self


class LabelConfig(_Section):
    num_slices: Positive = 200
    """Number of slices to propose for labelling."""


class FeatureConfig(_Section):
    encoder: str = "resnet18"
    """``pixels``, or the name of a torchvision classifier, used without its last layer."""
    weights: Location = "random"
    """``random``, ``imagenet`` (downloaded by torchvision), ``run:NAME`` (the chosen epoch of a
    brainray run) or the path of a local state dict or brainray checkpoint."""
    image_size: Side = 128
    """Height and width at which the encoder sees the slices, in pixels."""
    pretext: PretextName = "none"
    """Self-supervised training of the encoder on the fitted slices before features are extracted.
    """
    lambda_cluster: NonNegative = 0.0
    """Weight of the clustering loss, relative to the pretext loss, in the rounds of refinement that
    follow the epochs of the pretext alone; 0: no refinement."""

    @property
    def is_trained(self) -> bool:
        """Whether the encoder is trained on the slices before features are extracted."""
        return self.pretext != "none" or self.lambda_cluster > 0

    @model_validator(mode="after")
    def _pixels_learn_nothing(self) -> "FeatureConfig":
        if self.encoder == "pixels" and (self.is_trained or self.weights != "random"):
            raise ValueError(
                "encoder pixels has no weights to load or train: remove weights, pretext and "
                "lambda_cluster"
            )
        return self


class SelfSupervisionConfig(_Section):
    num_epochs: Positive = 20
    """Epochs of the pretext alone; none without a pretext."""
    temperature: PositiveFloat = 0.2
    """Temperature of the contrastive loss (NT-Xent)."""
    positives: Literal["slice", "subject"] = "slice"
    """Positive pairs of the contrastive pretext: two views of one slice, or, half of the time, of
    two slices likely of one subject, which are then never used as negatives of each other."""
    projection_dim: Positive = 128
    """Dimensions of the projection in which views are contrasted."""
    augment: Annotated[AugmentConfig, _of_policy("weak")] = AugmentConfig(policy="weak")
    """Augmentation of the views; the rotation pretext uses no upside-down flips and only small
    rotations."""
    batch_size_per_worker: Positive = 128
    """Slices per step and worker; the contrastive pretext uses two views of each."""
    learning_rate: PositiveFloat = 1.5e-3
    """Peak learning rate of the pretext's one-cycle schedule (AdamW)."""
    max_rounds: Positive = 10
    """Maximum number of rounds of refinement: train on the clusters, then cluster again."""
    round_epochs: Positive = 1
    """Epochs per round."""
    round_learning_rate: PositiveFloat = 3e-4
    """Peak learning rate of each round."""
    tolerance: Share = 0.01
    """A round is settled if at most this share of the slices changes cluster."""
    patience: Positive = 2
    """Refinement ends after this many settled rounds in a row."""


class SensitivityConfig(_Section):
    feature: str | None = None
    """Name of the features for which settings are varied; defaults to the last of
    ``study.features``."""
    num_clusters: tuple[AtLeastTwo, ...] = (2, 3, 4, 5, 6, 8, 10)
    """Values of K for K-means."""
    eps_factors: tuple[PositiveFloat, ...] = (0.6, 0.8, 1.0, 1.25, 1.5)
    """Values of DBSCAN's eps, in units of the knee of the k-distances."""
    linkages: tuple[Literal["average", "complete", "single"], ...] = (
        "average",
        "complete",
        "single",
    )
    """Linkages of agglomerative clustering, with cosine distance."""


class StudyConfig(_Section):
    features: dict[PlainName, FeatureConfig] = {}
    """Features to compare, by name: each an encoder, its weights and how it is trained; null
    removes one that the config file defines."""
    pca_dims: tuple[Positive, ...] = (32,)
    """Numbers of principal components to cluster on; every value is tried."""
    clusterers: tuple[ClustererName, ...] = get_args(ClustererName)
    """K-means, Gaussian mixture, agglomerative (average linkage, cosine; cut at K, or at
    ``depth``), DBSCAN, spectral and HDBSCAN."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of encoders and clusterers; tables give mean and standard deviation over seeds."""
    depth: Positive = 10
    """Levels below the root at which ``agglomerative_depth`` cuts the hierarchy."""
    min_samples: AtLeastTwo = 10
    """Neighbours of a core point, itself included, and the k of the k-distances, without itself;
    for HDBSCAN also the size of the smallest cluster."""
    max_quadratic_rows: Annotated[int, Field(ge=10)] = 8000
    """With more slices than this, clusterers with quadratic memory run on a random sample of this
    size; the other slices join the nearest centroid (DBSCAN: core; HDBSCAN: slice)."""
    candidate_num_clusters: tuple[AtLeastTwo, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Candidates for the number of clusters recommended without labels."""
    sensitivity: SensitivityConfig = SensitivityConfig()
    max_concurrent_cells: Count = 0
    """Cells of the grid computed at a time; 0 uses one CPU per cell."""

    @field_validator("pca_dims", "clusterers", "seeds", "candidate_num_clusters")
    @classmethod
    def _some_and_distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"give one or more distinct values, not {list(value)}")
        return value

    @field_validator("features", mode="before")
    @classmethod
    def _without_left_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: feature for name, feature in value.items() if feature is not None}

    @model_validator(mode="after")
    def _feature_is_known(self) -> "StudyConfig":
        wanted = self.sensitivity.feature
        if wanted is not None and wanted not in self.features:
            raise ValueError(
                f"sensitivity.feature {wanted!r} is not in study.features "
                f"({', '.join(self.features) or 'none'})"
            )
        return self


class RegistryConfig(_Section):
    name: str | None = None
    """Name under which an exported model, or the best model of a sweep, is registered in MLflow;
    not registered if unset."""

    @field_validator("name")
    @classmethod
    def _is_one_for_mlflow(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or set(value) & set("/:")):
            raise ValueError(f"{value!r} is no name for MLflow: write text without '/' and ':'")
        return value


class Config(_Section):
    """Configuration of all jobs; ``--help`` of a job lists the settings that it reads."""

    name: PlainName | None = None
    """Name of this job's result. The same name resumes, except that an export, or an evaluation of
    the same source, is replaced. Defaults to RUN-on-FOLDER in evaluate and predict, with ``epoch``
    to RUN-epochN-on-FOLDER, and to the run's name in export."""
    dataset: PlainName | None = None
    """Name of the image store to train on or to study; defaults to ``name`` in the pipeline,
    and in a study of ``source``."""
    run: PlainName | None = None
    """Name of the run to evaluate, predict with, label for, export, report or send to MLflow."""
    checkpoint: Location | None = None
    """Path of a checkpoint folder to evaluate, predict with or export, instead of ``run``."""
    epoch: Positive | None = None
    """Epoch of ``run`` to use, if its checkpoint was kept; defaults to the chosen epoch."""
    storage: Location = "~/brainray"
    """Where stores and runs are kept: an absolute path or a URI that pyarrow reads."""
    source: Location | None = None
    """Folder of slices: Training/ and Testing/ class folders, class folders, or bare files."""
    sources: dict[PlainName, Location] = {}
    """For a study: several folders of slices by name, instead of ``source``."""
    labels: Location | None = None
    """CSV or Parquet table with columns ``path``, ``label`` and optionally ``frame``, ``split``,
    ``subject``."""
    seed: Seed = 0
    """Seed of weights, batches, augmentation and clustering, and of the resamples for intervals."""
    classes: ClassesConfig = ClassesConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    split: SplitConfig = SplitConfig()
    encoder: EncoderConfig = EncoderConfig()
    augment: AugmentConfig = AugmentConfig()
    augment_unlabelled: Annotated[AugmentConfig, _of_policy("none")] = AugmentConfig(policy="none")
    objective: ObjectiveConfig = ObjectiveConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    train: TrainConfig = TrainConfig()
    self_supervision: SelfSupervisionConfig = SelfSupervisionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    tune: TuneConfig = TuneConfig()
    study: StudyConfig = StudyConfig()
    registry: RegistryConfig = RegistryConfig()
    label: LabelConfig = LabelConfig()

    def given(self, key: Literal["name", "dataset", "run", "source"]) -> str:
        """A setting that the caller needs.

        Raises:
            ConfigError: it is not set.
        """
        value: str | None = getattr(self, key)
        if value is None:
            raise ConfigError(f"give --set {key}={'DIR' if key == 'source' else 'NAME'}")
        return value

    def without_secrets(self) -> "Config":
        """A copy that may be saved with results: without the password in ``tracking.uri``."""
        if self.tracking.uri is None:
            return self
        tracking = self.tracking.model_copy(update={"uri": redacted(self.tracking.uri)})
        return self.model_copy(update={"tracking": tracking})

    @model_validator(mode="after")
    def _growth_fits(self) -> "Config":
        train = self.train
        if train.growth_epochs >= train.num_epochs:
            raise ValueError(
                f"train.growth_epochs ({train.growth_epochs}) leaves no epoch of train.num_epochs "
                f"({train.num_epochs}) at train.image_size: lower the former or raise the latter"
            )
        if train.growth_epochs and train.start_image_size >= train.image_size:
            raise ValueError(
                f"train.start_image_size ({train.start_image_size}) must be smaller than "
                f"train.image_size ({train.image_size}): lower it or set train.growth_epochs=0"
            )
        return self

    @model_validator(mode="after")
    def _inherited_labels_are_of_use(self) -> "Config":
        objective = self.objective
        is_of_use = objective.learns_pseudo_labels or objective.name == "supervised"  # the control
        if objective.inherit_labels != "none" and not is_of_use:
            raise ValueError(
                f"objective.inherit_labels={objective.inherit_labels}: "
                f"objective.name={objective.name} does not learn pseudo-labels; use consistency or "
                "anchored, or remove it"
            )
        return self
