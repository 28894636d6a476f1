"""The cases of ``jobs/benchmark.py``: the module of that name, and what it tells in a line.

They are named here without being imported: with Ray and PyTorch that takes seconds.
"""

CASES = {
    "duplicates": "recall of altered copies, neighbours kept apart, cost by number of slices",
    "gmm": "Gaussian mixtures against scikit-learn, and on two ranks",
    "intracranial": "overlap of the intracranial strip with brains that are known, beside Otsu's",
    "kmeans": "K-means against scikit-learn (Lloyd, Elkan) and faiss, and on two ranks",
    "labels": "accuracy against the share of labels, the recipe of --config and its control",
    "next_labels": "accuracy after labelling what jobs/label.py proposes, against random slices",
    "predict": "prediction of decoded slices and of files, against plain loops",
    "preprocess": "images per second, memory and the skull strip, against plain loops",
    "robustness": "accuracy of a run on test slices as other scanners may give them",
    "scaling": "time of each stage against its work, carried to large runs",
    "soak": "runs whose processes are killed at random, against an undisturbed one",
    "subjects": "error of estimated subject groups, and leaks through a split by them",
    "sweep": "four trials of a sweep against the same four runs begun by hand",
    "training": "steps, epochs, streaming and two workers, against a bare loop in memory",
}
