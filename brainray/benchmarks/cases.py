"""Names of the cases (modules) of ``jobs/benchmark.py``, with one-line descriptions.

The modules are not imported here, since importing Ray and PyTorch takes seconds.
"""

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

READS_CONFIG = {"labels", "next_labels", "robustness"}
READS_SOURCE = READS_CONFIG | {
    "duplicates",
    "intracranial",
    "preprocess",
    "soak",
    "subjects",
    "training",
}
