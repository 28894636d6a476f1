"""The unsupervised study: data sets, features, the grid of clusterings, tables, figures, page.

Labels, if any, are read for scoring only: no encoder, clusterer or selection sees them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brainray import layout
from brainray.config import Config
from brainray.config_text import flatten, parse_saved, to_yaml
from brainray.errors import BrainrayError, ConfigError
from brainray.models.features import check_encoder_name
from brainray.orchestration.lock import held
from brainray.orchestration.pretraining.features import checked_num_features
from brainray.orchestration.pretraining.weights import Weights, read_weights
from brainray.orchestration.publish import open_tracking
from brainray.orchestration.resources import alive_nodes, plan_workers
from brainray.orchestration.store import ImageStore, as_store_was_made, open_store
from brainray.orchestration.study.data import (
    open_stores,
    seen_by_features,
    study_features,
    study_set,
)
from brainray.orchestration.study.grid import (
    Grid,
    Outcome,
    check_sizes,
    main_cells,
    sensitivity_cells,
)
from brainray.orchestration.study.report import write_report
from brainray.orchestration.study.results import StudyResults
from brainray.schema import TRAIN
from brainray.storage import Folder


@dataclass(frozen=True)
class FinishedStudy:
    """Results of a study."""

    folder: Folder
    metrics: dict[str, float]
    text: str  # the main tables and recommendations
    mlflow_run_id: str | None
    tracking_uri: str

    @property
    def headline(self) -> dict[str, float]:
        """The metrics without those of single methods, of which there are hundreds."""
        return {
            name: value
            for name, value in self.metrics.items()
            if name.startswith("num_") or name.endswith("/recommended_num_clusters")
        }


def run_study(config: Config) -> FinishedStudy:
    """Compare features and clusterers on one or several data sets, or resume a study.

    With the same name, the study resumes: finished encoders, features and cells are read from their
    files, even if the grid has been extended.

    Raises:
        BrainrayError: unusable settings or data, or no cell could be computed.
        ray.train.TrainingFailedError: workers were lost more often than ``train.max_failures``.
    """
    config = checked_study(config)
    folder = Folder(config.storage) / layout.STUDIES / config.given("name")
    weights = {
        name: read_weights(config, each, f"study.features.{name}.weights")
        for name, each in config.study.features.items()
    }
    if not folder.exists(layout.CONFIG):
        _check_what_it_needs(config, weights)
    stores = open_stores(config)
    for name, store in stores.items():
        _check_store(config, name, store, weights)
    with held(Folder(config.storage), layout.STUDIES, folder.name):
        return _study(config, folder, stores, weights)


def _study(
    config: Config,
    folder: Folder,
    stores: Mapping[str, ImageStore],
    weights: Mapping[str, Weights],
) -> FinishedStudy:
    if folder.exists(layout.CONFIG):
        before = parse_saved(folder.read_bytes(layout.CONFIG), str(folder))
        if flatten(before) != flatten(config.without_secrets()):
            # MLflow runs keep their initial parameters, so changed settings need a new MLflow run.
            folder.delete_file(layout.TRACKING, missing_ok=True)
    folder.write_bytes(layout.CONFIG, to_yaml(config).encode())
    hashes = {
        f"brainray.data_hash.{name}": store.manifest.data_hash for name, store in stores.items()
    }
    tracker = open_tracking(config, folder, flatten(config.without_secrets()), hashes)
    tracker.running()
    with tracker.ended_by_errors():
        seen = seen_by_features(config)
        sets = {name: study_set(store, folder, seen) for name, store in stores.items()}
        features = study_features(config, sets, weights)
        slices = {name: each.slices for name, each in sets.items()}
        grid = Grid(config, folder, features.stores, slices)
        cells = [cell for name in sets for cell in main_cells(config, name)]
        varied = [cell for name in sets for cell in sensitivity_cells(config, name)]
        outcomes = grid.run([*cells, *varied])
        _check_outcomes(outcomes)
        main, others = outcomes[: len(cells)], outcomes[len(cells) :]
        report = write_report(StudyResults(config, folder, sets, features, grid, main, others))
    folder.write_json(layout.SUMMARY, report.metrics)
    tracker.log_summary(report.metrics)
    tracker.log_files([layout.CONFIG, layout.SUMMARY, *report.files])
    tracker.finish()
    return FinishedStudy(folder, report.metrics, report.text, tracker.mlflow_run_id, tracker.uri)


def checked_study(config: Config) -> Config:
    """The config of a study, with the settings of its store if it names an existing one.

    Raises:
        BrainrayError: settings that cannot be studied; there is no such store.
    """
    config.given("name")
    if config.sources and config.source is not None:
        raise ConfigError("give source or sources, not both")
    if config.sources and config.dataset is not None:
        raise ConfigError(
            f"give dataset={config.dataset} or sources, not both: each of the sources has its own "
            "image store"
        )
    if config.labels is not None and config.source is None:
        raise ConfigError(f"labels={config.labels} applies to a single source: also set source")
    if not config.sources and config.source is None:
        if config.dataset is None:
            raise ConfigError(
                "a study needs slices: use --set source=DIR, sources.NAME=DIR for several data "
                "sets, or dataset=NAME for an image store"
            )
        store = open_store(Folder(config.storage), config.dataset)
        config = as_store_was_made(config, store)
    if not config.study.features:
        raise ConfigError(
            "study.features is empty: name at least one, such as --set "
            "study.features.pixels.encoder=pixels study.features.pixels.image_size=32, or start "
            "from configs/study.yaml"
        )
    for name, feature in config.study.features.items():
        if feature.is_trained and feature.image_size > config.preprocess.image_size:
            raise ConfigError(
                f"study.features.{name}.image_size ({feature.image_size}) exceeds "
                f"preprocess.image_size ({config.preprocess.image_size}): lower it"
            )
    return config


def _check_what_it_needs(config: Config, weights: Mapping[str, Weights]) -> None:
    """Reject an invalid study before preprocessing, instead of during training or extraction."""
    if any(feature.is_trained for feature in config.study.features.values()):
        plan_workers(config.train, alive_nodes())
    for name, feature in config.study.features.items():
        check_encoder_name(feature.encoder)
        _ = weights[name].state  # downloads ImageNet weights


def _check_store(
    config: Config, name: str, store: ImageStore, weights: Mapping[str, Weights]
) -> None:
    """Reject within a second what would fail on workers after minutes."""
    num_features = {
        feature_name: checked_num_features(store, feature_name, feature, weights[feature_name])
        for feature_name, feature in config.study.features.items()
    }
    num_fitted = sum(store.manifest.num_slices[TRAIN].values())
    check_sizes(config, name, num_fitted, num_features)


def _check_outcomes(outcomes: Sequence[Outcome]) -> None:
    problems = sorted({outcome.problem for outcome in outcomes if outcome.problem})
    if len(problems) and all(outcome.problem for outcome in outcomes):
        raise BrainrayError(f"no cell of the grid could be computed: {'; '.join(problems)}")
