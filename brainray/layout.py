"""Names of the files that a store, a run and an evaluation consist of."""

# What a manifest and a run.json say they are: changed when older code would misread what newer
# code writes, or the other way round.
STORE_FORMAT = "brainray-image-store/4"
RUN_FORMAT = "brainray-run/3"
FEATURES_FORMAT = "brainray-features/1"
ENCODER_FORMAT = "brainray-encoder/1"

# Under storage, a folder each by name
DATASETS = "datasets"
RUNS = "runs"
EVALUATIONS = "evaluations"
SWEEPS = "sweeps"
DRAWS = "draws"  # of labels: figures over several runs
PREDICTED = "predictions"
LOCKS = "locks"  # a file for each name that a job is at work on
EXPORTS = "exports"
FEATURES = "features"  # by data set, encoder and a hash of what made them
ENCODERS = "encoders"  # self-supervised ones, named likewise
STUDIES = "studies"

# An image store: storage/datasets/NAME/
MANIFEST = "manifest.json"  # written last: a folder without one is no store
IMAGES = "images"  # a folder of Parquet parts of schema.IMAGE_STORE
FILES = "files.parquet"  # every slice of every file, without pixels: what the next run goes on from
SPLITS = "splits.parquet"  # the split of every slice that the store holds or ever held
REJECTED = "rejected.parquet"
DUPLICATES = "duplicates.parquet"
LEAKAGE = "leakage.json"
LEAKAGE_TABLE = "leakage.md"

# A run: storage/runs/NAME/
RUN = "run.json"
CONFIG = "config.yaml"
DATASET = "dataset"  # what the store says of itself: manifest, leakage, figures
SEEN = "seen.parquet"  # the labelled draw, and fingerprints of all that the run saw
SEEN_BEFORE = "seen_before.parquet"  # the same of what made the weights that it started from
TEST_SLICES = "test.parquet"  # the slices that the run is tested on
PROVENANCE = "provenance.jsonl"  # an object for each submission that trained the run
METRICS = "metrics.jsonl"  # one object an epoch
ABOUT = "about.json"  # what made the run: command, machine, versions
SUMMARY = "summary.json"  # written last: the run is complete
BEST = "best"  # checkpoint of the chosen epoch
LAST = "last"  # checkpoint of the last epoch
NEXT_LABELS = "labels/next.csv"  # which unlabelled slices to label next, for people to fill in
TRACKING = "tracking.json"  # what MLflow has got

# A checkpoint's folder
MODEL = "model.pt"  # all that prediction needs
TRAINER = "trainer.pt"  # what training needs beside it
FITTED = "fitted.parquet"  # of the chosen epoch: the slices that the mixture was fitted on

# A prediction: storage/predictions/NAME/
PART = "part-{number:06d}.parquet"

# An evaluation: storage/evaluations/NAME/
PREDICTIONS = "predictions.parquet"
EVALUATION_METRICS = "metrics.json"

# An export: storage/exports/NAME/
SAFETENSORS = "model.safetensors"
ONNX = "model.onnx"
SERVED = "mlflow"  # a folder that MLflow loads and serves
CARD = "README.md"  # written last

# A feature store: storage/features/NAME-HASH/, with a manifest
PARTS = "parts"  # a folder of Parquet parts of schema.FEATURES

# A self-supervised encoder: storage/encoders/NAME-HASH/, with metrics.jsonl
ENCODER = "encoder.pt"  # what encoder.weights=PATH reads; written last
STATE = "state.pt"  # what an encoder that is not finished goes on from
ROUNDS = "rounds"  # a Parquet file of assignments for each round of refinement

# A study: storage/studies/NAME/, with config.yaml and summary.json
STUDY = "study.json"  # what made it
CELLS = "cells"  # a JSON file for each finished cell of the grid, and its assignments
TABLES = "tables"

FIGURES = "figures"
OF_STORE = {
    MANIFEST,
    IMAGES,
    FILES,
    SPLITS,
    REJECTED,
    DUPLICATES,
    LEAKAGE,
    LEAKAGE_TABLE,
    FIGURES,
}
REPORT = "report.html"  # all of a run, or of an evaluation, on one page


CHECKPOINT_FOLDER = r"epoch-(\d+)"


def checkpoint_folder(epoch: int) -> str:
    """A run's checkpoint after an epoch, to go on from; the newest two are kept."""
    return f"epoch-{epoch:04d}"


def predictions_file(epoch: int) -> str:
    """A run's predictions for its test slices after an epoch."""
    return f"predictions/epoch-{epoch:04d}.parquet"
