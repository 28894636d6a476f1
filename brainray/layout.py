"""Names of the files that a store, a run and an evaluation consist of."""

# Format versions in manifests and run.json: changed when older code would misread what newer code
# writes, or the other way round.
STORE_FORMAT = "brainray-image-store/4"
RUN_FORMAT = "brainray-run/3"
FEATURES_FORMAT = "brainray-features/2"
ENCODER_FORMAT = "brainray-encoder/1"

# In storage: folders with a subfolder for each name
DATASETS = "datasets"
RUNS = "runs"
EVALUATIONS = "evaluations"
SWEEPS = "sweeps"
DRAWS = "draws"  # label draws: metrics over several runs
PREDICTIONS = "predictions"
LOCKS = "locks"  # a file for each name in use by a job
EXPORTS = "exports"
FEATURES = "features"  # by encoder and a hash of the settings and data
ENCODERS = "encoders"  # self-supervised encoders, named in the same way
STUDIES = "studies"

# An image store: storage/datasets/NAME/
MANIFEST = "manifest.json"  # written last: a folder without one is not a store
IMAGES = "images"  # a folder of Parquet parts of schema.IMAGE_STORE
FILES = "files.parquet"  # every slice of every file, without pixels: read by the next preprocessing
SPLITS = "splits.parquet"  # split and generation of every slice that is or was in the store
REJECTED = "rejected.parquet"
DUPLICATES = "duplicates.parquet"
LEAKAGE = "leakage.json"
LEAKAGE_TABLE = "leakage.md"

# A run: storage/runs/NAME/
RUN = "run.json"
CONFIG = "config.yaml"
DATASET = "dataset"  # the store's manifest, leakage report and figures
SEEN = "seen.parquet"  # the label draw, and fingerprints of all slices that the run saw
SEEN_BEFORE = "seen_before.parquet"  # the same for the training of its starting weights
TEST_SLICES = "test.parquet"  # the slices that the run is tested on
PROVENANCE = "provenance.jsonl"  # one object per submission that trained the run
METRICS = "metrics.jsonl"  # one object per epoch
SUMMARY = "summary.json"  # written last: the run is complete
BEST = "best"  # checkpoint of the chosen epoch
LAST = "last"  # checkpoint of the last epoch
NEXT_LABELS = "labels/next.csv"  # the unlabelled slices to label next, to be filled in
NEXT_LABELS_PARQUET = "labels/next.parquet"  # the same table
TRACKING = "tracking.json"  # what has been sent to MLflow

# A checkpoint's folder
MODEL = "model.pt"  # everything that prediction needs
TRAINER = "trainer.pt"  # what else training needs
FITTED = "fitted.parquet"  # for the chosen epoch: the slices that the mixture was fitted on

# A prediction: storage/predictions/NAME/
PART = "part-{number:06d}.parquet"
PREDICTIONS_CSV = "_predictions.csv"  # readers of the folder as a Parquet data set ignore it

# An evaluation: storage/evaluations/NAME/
EVALUATION_PREDICTIONS = "predictions.parquet"
EVALUATION_METRICS = "metrics.json"

# An export: storage/exports/NAME/
SAFETENSORS = "model.safetensors"
ONNX = "model.onnx"
SERVED = "mlflow"  # a folder that MLflow loads and serves
CARD = "README.md"  # written last

# A feature store: storage/features/NAME-HASH/, with a manifest
PARTS = "parts"  # a folder of Parquet parts of schema.FEATURES

# A self-supervised encoder: storage/encoders/NAME-HASH/, with metrics.jsonl
ENCODER = "encoder.pt"  # can be read by encoder.weights=PATH; written last
STATE = "state.pt"  # from which an unfinished encoder resumes
ROUNDS = "rounds"  # a Parquet file of assignments for each round of refinement

# A study: storage/studies/NAME/, with config.yaml and summary.json
CELLS = "cells"  # a JSON file for each finished cell of the grid, and its assignments
TABLES = "tables"

FIGURES = "figures"
REPORT = "report.html"  # the report of a run, an evaluation or a study


CHECKPOINT_FOLDER = r"epoch-(\d+)"


def checkpoint_folder(epoch: int) -> str:
    """A run's checkpoint after an epoch, for resuming: the newest two are kept, and the one chosen
    before the newest.
    """
    return f"epoch-{epoch:04d}"


EPOCH_PREDICTIONS = "predictions"  # a folder with a file for each kept epoch
EPOCH_OF_FITTED = "epoch"  # metadata of its schema: the model next to it may be of another epoch


def predictions_file(epoch: int) -> str:
    """A run's predictions for its test slices after an epoch."""
    return f"{EPOCH_PREDICTIONS}/epoch-{epoch:04d}.parquet"
