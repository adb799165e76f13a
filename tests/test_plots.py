"""The style of the plots: colors that differ with every kind of color vision, and not by color alone."""

import itertools

import numpy as np
import pytest

from specjax.experiments.reports import plots

# Machado, Oliveira and Fernandes 2009, severity 1: what linear RGB looks like without one kind of cones.
VISION = {
    "all cones": np.eye(3),
    "no long ones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no middle ones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no short ones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = TO_XYZ.sum(axis=1)
NOTICED = 10.0
"""A distance in CIELAB that nobody overlooks between two lines; 2.3 is just noticeable between areas side by side."""


def lab(color: str, vision) -> np.ndarray:
    """A color in CIELAB, as it is seen."""
    part = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    ratio = TO_XYZ @ np.clip(np.asarray(vision) @ linear, 0, 1) / WHITE
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def closest(colors, vision) -> float:
    return min(float(np.linalg.norm(lab(a, vision) - lab(b, vision))) for a, b in itertools.combinations(colors, 2))


@pytest.mark.parametrize("vision", VISION)
def test_every_eye_tells_the_colors_apart(vision):
    assert closest(plots.COLORS, VISION[vision]) > NOTICED


def test_colors_that_some_cannot_tell_apart_are_noticed():
    assert closest(("#3b6ea5", "#8a6bb0"), VISION["no long ones"]) < NOTICED


def test_no_two_lines_have_the_same_marker():
    assert len(plots.STYLES) == len({marker for _, marker in plots.STYLES}) == len(set(plots.COLORS))
