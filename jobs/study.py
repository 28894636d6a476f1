"""Compare features and clusterers without labels, on one or several data sets."""

import sys

from brainray import layout
from brainray.config import WORKER_KEYS, Config
from brainray.log import log
from brainray.orchestration.job import STORE_KEYS, JobResult, run_job


def check(config: Config) -> None:
    from brainray.orchestration.study.driver import checked_study

    checked_study(config)


def work(config: Config) -> JobResult:
    from brainray.orchestration.publish import how_to_open
    from brainray.orchestration.study.driver import run_study

    finished = run_study(config)
    log(finished.text)
    log(f"tables and figures: {finished.folder}")
    log(f"report: {finished.folder}/{layout.REPORT}")
    log(f"compare studies: {how_to_open(finished.tracking_uri)}")
    return JobResult(str(finished.folder), finished.mlflow_run_id, finished.headline)


if __name__ == "__main__":
    sys.exit(
        run_job(
            "study",
            """
            Cluster slices without labels: every feature set (pixels, pretrained, random and
            self-supervised encoders) with every clusterer, PCA dimension and seed. Writes tables
            with mean and standard deviation, figures, contact sheets, a recommended number of
            clusters, and report.html with all of them. Labels, where they exist, are used for
            scoring only. The same name resumes an interrupted study without repeating finished
            work.

            Example: python jobs/study.py --config configs/study.yaml --set source=/data/mri
                     python jobs/study.py --config configs/study.yaml
                     --set sources.first=/data/one sources.second=/data/two
            """,
            work,
            keys=[
                "name",
                "dataset",
                "source",
                "sources",
                "labels",
                "storage",
                *STORE_KEYS,
                "clustering.num_clusters",
                "clustering.pca_dim",
                "clustering.covariance_type",
                "clustering.kmeans_max_iter",
                "clustering.gmm_max_iter",
                "clustering.gmm_tol",
                "clustering.reg_covar",
                "clustering.max_cluster_share",
                "clustering.min_spread",
                "clustering.on_collapse",
                "study",
                "self_supervision",
                *WORKER_KEYS,
                "train.embed_batch_size",
                "train.weight_decay",
                "train.warmup_fraction",
                "train.precision",
                "evaluation.tsne_max_slices",
                "tracking",
            ],
            needs=("name",),
            check=check,
        )
    )
