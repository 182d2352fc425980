"""What a method wants to know of a layer."""

from enum import Enum


class Needs(Enum):
    """What a method wants to know of a layer, each including what stands before it."""

    WEIGHTS = "weights"
    SCALES = "scales"
    COVARIANCE = "covariance"
    CURVATURE = "curvature"
