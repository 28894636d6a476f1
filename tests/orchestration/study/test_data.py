"""Which features a study has to compute."""

import pytest

from brainray.config import FeatureConfig
from brainray.orchestration.study.data import _depends_on_seed


@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        ({"encoder": "pixels", "weights": "random"}, False),
        ({"encoder": "resnet18", "weights": "random"}, True),
        ({"encoder": "resnet18", "weights": "imagenet"}, False),
        ({"encoder": "resnet18", "weights": "imagenet", "pretext": "rotation"}, True),
    ],
)
def test_features_are_computed_for_each_seed_on_which_they_depend(
    feature: dict[str, str], expected: bool
) -> None:
    assert _depends_on_seed(FeatureConfig.model_validate(feature)) == expected
