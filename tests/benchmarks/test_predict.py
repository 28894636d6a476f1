"""The limit that prediction of files is compared with."""

import pytest

from brainray.benchmarks import predict


def test_decoding_and_embedding_share_the_cores_unless_there_is_a_gpu() -> None:
    """30 files take 0.1 s to decode and 0.3 s to embed."""
    assert predict._limit(300.0, 100.0, "cpu") == pytest.approx(30 / 0.4)
    assert predict._limit(300.0, 100.0, "cuda") == 100.0
