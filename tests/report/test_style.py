"""Colours that colour-blind people can tell apart, by simulation."""

from itertools import combinations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from brainray.report.style import class_colours, cluster_colour

# Machado, Oliveira & Fernandes 2009, severity 1, for linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def as_seen(colour: str, deficiency: str) -> NDArray[np.float32]:
    """CIE L*a*b* of a colour, as an eye with the deficiency sees it."""
    code = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    encoded = np.array(code)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(DEFICIENCIES[deficiency] @ linear, 0, 1)
    # OpenCV's L*a*b* of linear RGB.
    return np.asarray(cv2.cvtColor(seen.astype(np.float32)[None, None], cv2.COLOR_LRGB2LAB))[0, 0]


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize(
    "colours",
    [
        list(class_colours(["glioma", "meningioma", "notumor", "pituitary"]).values()),
        [cluster_colour(number) for number in range(4)],
    ],
    ids=["classes", "clusters"],
)
def test_colours_of_four_classes_or_clusters_stay_apart(
    colours: list[str], deficiency: str
) -> None:
    # A difference of 2.3 is just noticeable; dots want several times that.
    for one, two in combinations(colours, 2):
        distance = np.linalg.norm(as_seen(one, deficiency) - as_seen(two, deficiency))
        assert distance > 12, (one, two)
