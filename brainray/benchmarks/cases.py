"""Names of the cases (modules) of ``jobs/benchmark.py``, with one-line descriptions.

The modules are not imported here, since importing Ray and PyTorch takes seconds.
"""

from typing import Any

CASES = {
    "duplicates": "near-duplicate search: recall, precision, time by number of slices",
    "gmm": "Gaussian mixtures vs scikit-learn, and on two ranks",
    "intracranial": "intracranial skull strip: overlap with known brains, vs Otsu",
    "kmeans": "K-means vs scikit-learn (Lloyd, Elkan) and faiss, and on two ranks",
    "labels": "accuracy by share of labels, for the recipe of --config and its control",
    "next_labels": "accuracy after labelling the proposals of jobs/label.py vs random slices",
    "predict": "throughput of prediction on decoded slices and on files, vs plain loops",
    "preprocess": "throughput, memory and skull strip of preprocessing, vs plain loops",
    "robustness": "accuracy of a run on test slices altered as by other scanners",
    "scaling": "time of each stage by amount of work, extrapolated to large runs",
    "soak": "runs whose processes are killed at random, vs an undisturbed run",
    "subjects": "errors of estimated subject groups, and leakage through a grouped split",
    "sweep": "overhead of a sweep: four trials vs the same four runs started by hand",
    "training": "steps, epochs, streaming and two workers, vs a bare loop in memory",
}

OVERRIDDEN = {
    "labels": {
        "split.seed": "use --seed, which stands for it",
        "split.labelled_fraction": "it trains on several shares of the labels",
        "evaluation.control": "it trains controls of its own",
    },
    "next_labels": {
        "dataset": "it makes image stores of its own",
        "labels": "it writes labels tables of its own",
        "split.seed": "use --seed, which stands for it",
        "split.labelled_fraction": "its runs read all labels of their tables",
        "evaluation.tsne_epochs": "its runs draw no maps",
        "label.num_slices": "it adds 200 labels, or 40 with --quick",
    },
}
"""Settings that a case sets itself, with the reason or the remedy."""

QUICK_SETTINGS: dict[str, dict[str, Any]] = {
    "next_labels": {
        "preprocess.image_size": 64,
        "preprocess.subject.estimate": False,
        "train.image_size": 64,
        "train.num_epochs": 4,
        "train.num_workers": 1,
        "train.batch_size_per_worker": 16,
        "train.labelled_batch_size_per_worker": 16,
        "clustering.pca_dim": 8,
    },
}
"""Settings with ``--quick``, which override ``--config``."""

NAMED = {"labels"}
"""Cases whose runs have names that begin with the config's."""

READS_CONFIG = {"labels", "next_labels", "robustness"}
READS_SOURCE = READS_CONFIG | {
    "duplicates",
    "intracranial",
    "preprocess",
    "soak",
    "subjects",
    "training",
}
