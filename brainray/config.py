"""Typed configuration: YAML files and ``--set dotted.key=value``, validated at the door.

``Config`` is the tree that every job loads; each consumer receives only the section it needs.
Unknown keys are refused with the nearest known one named.
"""

import re
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

from brainray.redaction import redacted

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]  # 0 included
Positive = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=16, le=2048)]  # of slices, in pixels

PretextName = Literal["none", "rotation", "contrastive"]

SearchDomain = dict[Literal["choice", "uniform", "log_uniform", "integer"], list[Any]]
SearchSpace = dict[str, SearchDomain]

WEIGHTS_OF_NO_SLICE = ("random", "imagenet")
"""Names of starting weights that no MRI slice has made; others are paths or runs."""

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
"""Names a folder of its own in ``storage``, and nothing else."""


def _without_secret(uri: str) -> str:
    if redacted(uri) != uri:
        raise ValueError(
            f"{redacted(uri)} holds a password or key: give it in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for example), not in the URI, "
            "which is kept with results and shown"
        )
    return uri


Location = Annotated[str, AfterValidator(_without_secret)]
"""A path or URI that is kept with results and shown, so that no secret may be in it."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )


class ClassesConfig(_Section):
    map: dict[str, str | None] = {}
    """Renames of class folders or label values, for example ``glioma_tumor: glioma``; null takes
    the label away: in training its slices count as unlabelled, in an evaluation they are left out.
    """


class NearDuplicateConfig(_Section):
    similarity: Fraction = 0.996
    """Least similarity, after alignment, of two slices that are copies."""
    turned_similarity: Fraction = 0.997
    """The same of a mirrored or rotated copy; heads are nearly symmetric, so it is stricter."""
    num_candidates: Positive = 16
    """Slices with the most similar descriptors that are compared on pixels, for each slice."""
    num_turned_candidates: Positive = 4
    """The same for each of the seven other orientations."""
    descriptor_similarity: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.75
    """Least cosine of the descriptors of candidates."""
    turned_descriptor_similarity: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.93
    """The same for the seven other orientations."""


class SubjectConfig(_Section):
    estimate: bool = True
    """Guess by looks which slices are of one subject, of those that no table, header or volume's
    file names."""
    same_view_similarity: Fraction = 0.95
    """Similarity from which two slices show the same and are one view."""
    min_similarity: Fraction = 0.6
    """Least similarity of two mutual neighbours that are linked."""
    min_lone_similarity: Fraction = 0.65
    """Least similarity of a pair that is judged by itself, without the proof of mutuality."""
    min_group_similarity: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.3
    """Least mean similarity between the views of two groups that a link may merge."""
    num_neighbours: Positive = 2
    """A link needs each view among this many nearest of the other: a slice has two sides."""
    max_slices: Positive = 40
    """Most views (copies and flips count once) of a group, against chains from head to head."""


class VolumeConfig(_Section):
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """Plane in which NIfTI volumes are sliced."""
    window_low: Annotated[float, Field(ge=0.0, lt=50.0)] = 0.5
    """Percentile of the intensities that becomes black, where the file names no window."""
    window_high: Annotated[float, Field(gt=50.0, le=100.0)] = 99.5
    """Percentile of the intensities that becomes white."""
    min_foreground: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Slices of a volume of which a smaller share is head are skipped as empty."""
    max_voxels: Positive = 1_000_000_000
    """Volumes whose header announces more voxels are rejected before they are decoded."""


class PreprocessConfig(_Section):
    image_size: Side = 256
    """Height and width of the stored slices, in pixels."""
    skull_strip: Literal["otsu", "intracranial", "none"] = "otsu"
    """``otsu`` is METHOD A's: it removes the background and little else; ``intracranial`` removes
    skull, scalp, eyes and face too, and leaves a slice to ``otsu`` where it is not sure."""
    frame: Literal["keep", "remove"] = "keep"
    """``remove`` takes off a white border, bar or page around the head, as screenshots have them,
    before the skull strip, which would take them for the head."""
    crop: Literal["none", "foreground"] = "none"
    """``foreground`` crops each slice to the bounding box of what the skull strip keeps (of what
    ``otsu`` would keep, where there is none): heads fill the slice, whatever the field of view."""
    resize: Literal["stretch", "letterbox"] = "stretch"
    """``stretch`` fills the square (A); ``letterbox`` keeps the aspect ratio (B)."""
    intensity: Literal["as_is", "min_max", "auto_gamma"] = "as_is"
    """``min_max`` stretches each slice's intensities to 0..255 before it is stored (B);
    ``auto_gamma`` then gives all slices the same median grey, by a power of their own."""
    min_side: Positive = 32
    """Files with a shorter height or width, in pixels, are rejected."""
    max_pixels: Positive = 64_000_000
    """Files whose header announces more pixels are rejected before they are decoded."""
    min_intensity_std: Annotated[float, Field(ge=0.0)] = 2.0
    """Slices with a smaller standard deviation (of 0..255) are rejected as blank."""
    max_rejected_fraction: Share = 0.5
    """The job fails when a larger share of the files is rejected."""
    near_duplicate: NearDuplicateConfig = NearDuplicateConfig()
    subject: SubjectConfig = SubjectConfig()
    volume: VolumeConfig = VolumeConfig()
    files_per_task: Annotated[int, Field(ge=0)] = 0
    """Files that one Ray Data task decodes, and fewer where they are large (64 MiB together). 0
    makes tasks of 1,024 to 16 files, shorter towards the end."""


class SplitConfig(_Section):
    mode: Literal["official", "grouped", "purge"] = "official"
    """``official`` keeps the source's Training and Testing folders, and draws where it has none;
    ``grouped`` always draws, and no group of duplicates or of one subject crosses the split;
    ``purge`` keeps the folders and drops the training slices that have a twin among the test's."""
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the slices that a drawn split holds out for testing."""
    seed: int = 0
    """Seed of the drawn split and of the labelled draw."""
    labelled_fraction: Fraction = 0.2
    """Share of the labelled training slices whose label may be read; drawn at training. 1 reads
    every label that there is."""
    validation_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.15
    """Share of the labelled draw that is held out to choose the epoch."""
    validation: Literal["slice", "subject"] = "slice"
    """What is held out for it: ``slice``, slices and their copies, whose subjects may be learned
    from as well, unless they are named; ``subject``, subjects, named or estimated, of whom nothing
    else is learned from, but by a warm-up without labels: nearer to what a new subject would give,
    with less to learn from."""


class EncoderConfig(_Section):
    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    """The torchvision encoder, without its last layer."""
    weights: Location = "random"
    """``random``, ``imagenet`` (downloaded by torchvision) or the path of a local state dict."""
    pretext: PretextName = "none"
    """Warm-up: what the encoder learns on all training slices, without labels, before it is trained
    (``self_supervision``). Runs on one store share it if ``seed``, ``train.weight_decay``,
    ``train.warmup_fraction`` and ``train.precision`` are the same too."""
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
    """Strengths of what is not set here: METHOD A's kinds, nothing, few and small ones, or all of
    them."""
    horizontal_flip: Share = 0.5
    """Probability of a left-right flip."""
    vertical_flip: Share = 0.1
    """Probability of an up-down flip."""
    rotation_probability: Share = 0.5
    """Probability of a rotation."""
    max_rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 90.0
    """Largest rotation either way; small ones are more frequent (half are below an eighth)."""
    max_zoom: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Zoom factors are uniform in 1 +- this."""
    max_intensity_shift: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Contrast factor and brightness offset, in units of [0, 1] intensity."""
    max_shift: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Shifts along either axis are uniform between minus and plus this share of the side."""
    max_log_gamma: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    """Intensities are raised to exp(g), g uniform between minus and plus this."""
    intensity_curve: Share = 0.0
    """How far greys go through a random tone curve, as of another contrast or export: a factor
    whose logarithm is a sum of cosines of the intensity, of weights with this standard deviation
    (the k-th a k-th of it)."""
    bias_field: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    """Standard deviation of the logarithm of a smooth field that multiplies the slice, as the
    uneven sensitivity of a receive coil does."""
    max_noise_std: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Gaussian noise of a standard deviation uniform between 0 and this, in units of [0, 1]."""
    max_blur_sigma: Annotated[float, Field(ge=0.0, le=3.0)] = 0.0
    """Gaussian blur of a sigma uniform between 0 and this, in pixels."""
    cutout_probability: Share = 0.0
    """Probability that a square is blacked out (DeVries & Taylor 2017)."""
    max_cutout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """Sides of the squares are uniform between 0 and this share of the slice's."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_policy(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        policy = values.get("policy", "published")
        return (_POLICIES.get(policy, {}) if isinstance(policy, str) else {}) | values

    @property
    def changes_nothing(self) -> bool:
        """Whether slices are seen as they are."""
        strengths = self.model_dump(exclude={"policy"})
        return strengths == AugmentConfig(policy="none").model_dump(exclude={"policy"})


def _of_policy(default: str) -> BeforeValidator:
    """Of a section that sets strengths and names no policy: this one, not `AugmentConfig`'s."""

    def fill(values: Any) -> Any:
        return {"policy": default} | values if isinstance(values, dict) else values

    return BeforeValidator(fill)


class ObjectiveConfig(_Section):
    name: Literal["joint", "supervised", "consistency", "prototype", "anchored"] = "joint"
    """``joint`` is METHOD A's; ``supervised`` its control: cross entropy on the labelled only;
    ``consistency`` trains on confident pseudo-labels, ``prototype`` on assignments to the
    mixture's means, ``anchored`` on both."""
    lambda_cluster: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the clustering term."""
    lambda_consistency: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the pseudo-labels' cross entropy."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.1
    """Of the softmax over cosines to the prototypes: smaller is sharper."""
    ramp_epochs: Annotated[int, Field(ge=0)] = 5
    """Epochs over which the weight of pseudo-labels and assignments to prototypes rises."""
    inherit_labels: Literal["none", "subject"] = "none"
    """Which unlabelled slices have a pseudo-label from elsewhere than the teacher: with
    ``subject`` those that are, by their looks, of one subject with labelled ones, most of whose
    label it is. Of use to ``consistency`` and ``anchored``."""


class ClusteringConfig(_Section):
    num_clusters: Annotated[int, Field(ge=2)] = 4
    """K."""
    pca_dim: Positive = 32
    """Dimensions of the space in which the mixture is fitted; capped by the embedding's."""
    covariance_type: Literal["spherical", "diag", "tied", "full"] = "full"
    """Shape of the mixture's components."""
    kmeans_max_iter: Positive = 100
    """Limit on Lloyd iterations."""
    gmm_max_iter: Positive = 100
    """Limit on EM iterations."""
    gmm_tol: Annotated[float, Field(gt=0.0)] = 1e-3
    """EM stops when the mean log-likelihood gains less."""
    reg_covar: Annotated[float, Field(gt=0.0)] = 1e-6
    """Added to the covariances' diagonal."""
    anchors: Literal["none", "labelled"] = "none"
    """``labelled`` holds each labelled slice to the clusters of its class while the mixture is
    fitted; ``none`` clusters without labels, as METHOD A does."""
    max_cluster_share: Fraction = 0.99
    """A cluster that holds more of the slices is called a collapse."""
    min_spread: Annotated[float, Field(ge=0.0)] = 1e-4
    """A smaller mean squared distance of normalised embeddings to their mean is a collapse."""
    on_collapse: Literal["stop", "reseed", "warn"] = "stop"
    """``reseed`` fits the epoch's clusters anew from fresh seeds, and stops where that does not
    help; ``warn`` says so and goes on, where clusters could be fitted at all."""


class TrainConfig(_Section):
    image_size: Side = 256
    """Height and width at which the encoder sees the slices, in pixels."""
    growth_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs of progressive resizing, in which slices grow from ``start_image_size`` by steps of 32
    pixels; the epoch that predicts is chosen among the later ones. 0: ``image_size`` throughout."""
    start_image_size: Side = 64
    """Height and width in the first of the ``growth_epochs``."""
    num_epochs: Positive = 20
    """An epoch is one pass over the unlabelled slices; the labelled ones cycle."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """DDP ranks; 0 takes every GPU of the Ray cluster, or one worker where it has none."""
    min_workers: Annotated[int, Field(ge=0)] = 0
    """Ranks with which training begins, or goes on where nodes are lost; more join, up to
    ``num_workers``, as nodes come (looked for once a minute; the epoch under way is begun anew).
    0 waits for all of them."""
    cpus_per_worker: Annotated[int, Field(ge=0)] = 0
    """CPUs (and threads) of each worker; 0 shares the Ray cluster's CPUs among the workers."""
    gpus_per_worker: Fraction = 1.0
    """Share of a GPU that a worker takes where it trains on one; trials of a sweep may share."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA where the Ray cluster has GPUs."""
    batch_size_per_worker: Positive = 64
    """Unlabelled slices of a step, on each worker."""
    labelled_batch_size_per_worker: Positive = 64
    """Labelled slices of a step, on each worker."""
    embed_batch_size: Positive = 256
    """Slices of one inference batch."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1.5e-3
    """Peak of the one-cycle schedule (AdamW)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """AdamW's decoupled weight decay."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """What is embedded, evaluated and saved is an exponential average of the weights over the
    steps, of this decay, with batch statistics of slices of which half are augmented; 0 is the
    trained weights themselves."""
    mixup_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """Labelled slices are mixed in pairs, with their labels, by Beta-distributed shares of this
    parameter (mixup); 0 mixes none."""
    warmup_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the steps in which the learning rate rises."""
    accumulation_steps: Positive = 1
    """Batches whose gradients are averaged for one step of the optimiser."""
    compile: bool = False
    """Compile the encoder with torch.compile: minutes at the start, faster steps on a GPU."""
    cache_gib: Annotated[float, Field(ge=0.0)] = 4.0
    """A worker's slices, in GiB, that may stay in the memory of its device; what is beyond is
    streamed from a file of its node. (A warm-up holds all of its smaller ones.)"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto`` is bf16 autocast where the hardware computes it, else fp32."""
    wait_for_nodes: bool = False
    """Wait for an autoscaler to bring what the Ray cluster lacks now, instead of refusing; set
    ``num_workers``, ``cpus_per_worker`` and ``device`` then."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often lost workers are replaced before the job gives up."""
    collective_timeout_s: Positive = 1800
    """How long a worker waits for the others in a collective before it gives up."""


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
"""Settings of ``train`` that say where workers run and how many there are, not what they learn."""


class EvaluationConfig(_Section):
    test_each_epoch: bool = True
    """Test slices are embedded and scored after every epoch, as METHOD A reports; or once, by the
    chosen epoch, when training has ended. Nothing is chosen by them either way."""
    tsne_epochs: tuple[int, ...] = (1, 5, 10, 15, 20)
    """Epochs whose embeddings are kept and drawn as a t-SNE map."""
    tsne_max_slices: Positive = 2000
    """Slices on a map."""
    control: str | None = None
    """Name of the run whose figures stand beside this one's in its report; with
    ``num_label_draws``, its name before ``-drawI``."""
    num_label_draws: Positive = 1
    """Draws of the labelled slices, each trained on as a run ``NAME-drawI`` with the split seeds
    from ``split.seed`` on; figures over them are compared with the control's draw by draw."""
    siblings: tuple[str, ...] = ()
    """Names of runs on the same store that differ in ``seed``: the report tells which of this
    run's sub-types (several clusters of one class) they find again."""
    bootstrap_resamples: Positive = 1000
    """Resamples behind each confidence interval."""


class TrackingConfig(_Section):
    uri: str | None = None
    """MLflow tracking URI; ``MLFLOW_TRACKING_URI`` wins; default: ``mlflow.db`` in a local
    ``storage``, else in ``~/brainray`` of the machine that runs the job. A password in it is not
    kept with results."""
    experiment: str = "brainray"
    """MLflow experiment; made when absent."""


VALIDATION_FIGURES = {
    "validation/score": "max",
    "validation/head/accuracy": "max",
    "validation/head/balanced_accuracy": "max",
    "validation/cluster/accuracy": "max",
    "validation/loss": "min",
    "validation/calibration_error": "min",
}
"""Figures of every epoch (`engine.evaluate`) by which trials can be compared; what is better."""


class TuneConfig(_Section):
    space: SearchSpace = {}
    """For each dotted config key one of ``choice: [...]`` and ``uniform``, ``log_uniform`` or
    ``integer`` with ``[low, high]``."""
    algorithm: Literal["random", "grid", "optuna"] = "random"
    """``grid`` takes every combination of choices; ``optuna`` learns from finished trials (TPE)."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """What stops poor trials early: successive halving, the median rule, or nothing."""
    num_trials: Positive = 16
    """Trials of the whole sweep, resumed ones included; ``grid`` has as many as combinations."""
    metric: str = "validation/score"
    """What is compared: a figure of the validation slices; test figures are refused."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller ``metric`` is better."""
    min_epochs: Positive = 2
    """No trial is stopped before it has trained for so many epochs."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """Successive halving keeps one trial in so many at each rung."""
    max_concurrent_trials: Annotated[int, Field(ge=0)] = 0
    """Trials at a time; 0 takes as many as the Ray cluster holds."""
    time_budget_min: Annotated[float, Field(gt=0.0)] | None = None
    """No trial goes on after so many minutes of searching, in one submission or several: then the
    sweep is complete."""

    @field_validator("metric")
    @classmethod
    def _is_of_validation(cls, value: str) -> str:
        if not value.startswith("validation/"):
            raise ValueError(
                f"{value!r} is no validation figure: choosing by test figures would fit the sweep "
                "to the test slices; use one under validation/, such as validation/score"
            )
        if value not in VALIDATION_FIGURES:
            raise ValueError(
                f"{value!r} is reported by no epoch: use one of {', '.join(VALIDATION_FIGURES)}"
            )
        return value

    @model_validator(mode="after")
    def _mode_fits_the_metric(self) -> "TuneConfig":
        wanted = VALIDATION_FIGURES[self.metric]
        if self.mode != wanted:
            raise ValueError(f"{self.metric} is best where it is {wanted}: set tune.mode={wanted}")
        return self


class LabelConfig(_Section):
    num_slices: Positive = 200
    """Slices to propose for labelling."""


class FeatureConfig(_Section):
    encoder: str = "resnet18"
    """``pixels``, or the name of a torchvision classifier, which loses its last layer."""
    weights: Location = "random"
    """``random``, ``imagenet`` (downloaded by torchvision), ``run:NAME`` (the chosen epoch of a
    brainray run) or the path of a local state dict or brainray checkpoint."""
    image_size: Side = 128
    """Height and width at which the encoder sees the slices, in pixels."""
    pretext: PretextName = "none"
    """Self-supervision of the encoder on the fitted slices before features are extracted."""
    lambda_cluster: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the clustering loss beside the pretext's in rounds of refinement, which follow the
    epochs of the pretext alone; 0: no rounds."""

    @property
    def is_trained(self) -> bool:
        """Whether the encoder learns from the slices before it gives features."""
        return self.pretext != "none" or self.lambda_cluster > 0

    @model_validator(mode="after")
    def _pixels_learn_nothing(self) -> "FeatureConfig":
        if self.encoder == "pixels" and (self.is_trained or self.weights != "random"):
            raise ValueError(
                "encoder pixels has no weights to load or train: leave weights, pretext and "
                "lambda_cluster out"
            )
        return self


class SelfSupervisionConfig(_Section):
    num_epochs: Positive = 20
    """Epochs of the pretext alone; without a pretext there are none."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.2
    """Of the contrastive loss (NT-Xent)."""
    positives: Literal["slice", "subject"] = "slice"
    """What the contrastive pretext draws together: two views of a slice, or every other time of two
    slices that are likely of one subject, which are then never held against each other."""
    projection_dim: Positive = 128
    """Dimensions in which views are contrasted."""
    augment: Annotated[AugmentConfig, _of_policy("weak")] = AugmentConfig(policy="weak")
    """How views differ; the rotation pretext flips none upside down and turns them little. Short
    trainings learn nothing from ``strong`` views (docs/study.md)."""
    batch_size_per_worker: Positive = 128
    """Slices of a step, on each worker; the contrastive pretext sees each twice."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1.5e-3
    """Peak of the pretext's one-cycle schedule (AdamW)."""
    max_rounds: Positive = 10
    """Limit on the rounds of refinement: train on the clusters, then cluster anew."""
    round_epochs: Positive = 1
    """Epochs of each round."""
    round_learning_rate: Annotated[float, Field(gt=0.0)] = 3e-4
    """Peak of the schedule of each round."""
    tolerance: Share = 0.01
    """Share of the slices that change their cluster at which assignments count as settled."""
    patience: Positive = 2
    """Refinement ends after so many settled rounds in a row."""


class SensitivityConfig(_Section):
    feature: str | None = None
    """Features on which settings are varied; the last of ``study.features`` where left out."""
    num_clusters: tuple[Annotated[int, Field(ge=2)], ...] = (2, 3, 4, 5, 6, 8, 10)
    """K of K-means."""
    eps_factors: tuple[Annotated[float, Field(gt=0.0)], ...] = (0.6, 0.8, 1.0, 1.25, 1.5)
    """DBSCAN's eps, in units of the knee of the k-distances."""
    linkages: tuple[Literal["average", "complete", "single"], ...] = (
        "average",
        "complete",
        "single",
    )
    """Of agglomerative clustering, with cosine distance."""


class StudyConfig(_Section):
    features: dict[PlainName, FeatureConfig] = {}
    """The compared features, by name: each an encoder with its weights and how it is trained; null
    leaves out one that the file names."""
    pca_dims: tuple[Positive, ...] = (32,)
    """Principal components that are clustered; every value is tried."""
    clusterers: tuple[ClustererName, ...] = get_args(ClustererName)
    """K-means, Gaussian mixture, agglomerative (average linkage, cosine; cut at K, or at
    ``depth``), DBSCAN, spectral and HDBSCAN."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    """Of encoders and clusterers; tables give mean and standard deviation over them."""
    depth: Positive = 10
    """Levels below the root at which ``agglomerative_depth`` cuts the hierarchy."""
    min_samples: Annotated[int, Field(ge=2)] = 10
    """Neighbours that make a dense place (DBSCAN, HDBSCAN); also k of the k-distances."""
    max_quadratic_rows: Annotated[int, Field(ge=10)] = 8000
    """Above so many slices, clusterers whose memory is quadratic run on a drawn sample of this
    size; the others join the nearest centroid (or core)."""
    candidate_num_clusters: tuple[Annotated[int, Field(ge=2)], ...] = (2, 3, 4, 5, 6, 7, 8)
    """Numbers of clusters among which one is recommended without labels."""
    sensitivity: SensitivityConfig = SensitivityConfig()
    max_concurrent_cells: Annotated[int, Field(ge=0)] = 0
    """Cells of the grid at a time; 0 takes a CPU each."""

    @field_validator("pca_dims", "clusterers", "seeds", "candidate_num_clusters")
    @classmethod
    def _some_and_distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"give one or more different values, not {list(value)}")
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
                f"sensitivity.feature {wanted!r} is none of study.features "
                f"({', '.join(self.features) or 'none'})"
            )
        return self


class RegistryConfig(_Section):
    name: str | None = None
    """Name under which an exported model, or a sweep's best, is registered in MLflow; none
    registers nothing."""


class Config(_Section):
    """What jobs read; ``--help`` tells which settings are a job's own."""

    name: PlainName | None = None
    """Name of what this job makes; the same name resumes (an export is replaced, and so is an
    evaluation of the same source)."""
    dataset: PlainName | None = None
    """Name of the image store that training reads; the pipeline's is its ``name`` by default."""
    run: PlainName | None = None
    """Name of the run that is evaluated, predicts, is labelled for, exported, reported or sent."""
    checkpoint: Location | None = None
    """Path of a checkpoint folder that evaluates, predicts or is exported, instead of ``run``."""
    epoch: Annotated[int, Field(ge=1)] | None = None
    """Epoch of ``run`` that predicts, where its checkpoint was kept; by default the chosen one."""
    storage: Location = "~/brainray"
    """Where stores and runs are kept: an absolute path or a URI that pyarrow reads."""
    source: Location | None = None
    """Folder of slices: Training/ and Testing/ class folders, class folders, or bare files."""
    sources: dict[PlainName, Location] = {}
    """Several folders of slices by name, instead of ``source``, for a study."""
    labels: Location | None = None
    """CSV or Parquet with ``path``, ``label`` and optionally ``split``, ``subject``."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, batches, augmentation and clustering."""
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

    def without_secrets(self) -> "Config":
        """As it may be kept with results: without the password of ``tracking.uri``."""
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
                f"({train.num_epochs}) at train.image_size: lower the first or raise the second"
            )
        if train.growth_epochs and train.start_image_size >= train.image_size:
            raise ValueError(
                f"train.start_image_size ({train.start_image_size}) must be below train.image_size "
                f"({train.image_size}) for slices to grow; or set train.growth_epochs=0"
            )
        return self

    @model_validator(mode="after")
    def _inherited_labels_are_of_use(self) -> "Config":
        objective = self.objective
        if objective.inherit_labels != "none" and objective.name in ("joint", "prototype"):
            raise ValueError(
                f"objective.inherit_labels={objective.inherit_labels} is of no use to "
                f"objective.name={objective.name}, which learns no pseudo-labels: take "
                "consistency or anchored, or leave it out"
            )
        return self
