"""The flags that --method avc adds to stage 1, and what holds if they are left out."""
from utils.options import Flag, number, weight

FLAGS = {
    "avc_equivariance": Flag(weight, "weight of the term that two views have the same affinity vectors; 0: none", 2.0),
    "avc_agreement": Flag(weight, "weight of the term that cells of one label have the same vector; 0: none", 0.2),
    "avc_separation": Flag(weight, "weight of the term that cells of different labels have no affinity; 0: none", 1.0),
    "avc_consistency": Flag(weight, "weight of the term that two views' refined maps are the same; 0: none", 0.0),
    "avc_colour": Flag(weight, "standard deviation of colours within an object, in standard deviations of ImageNet's "
                               "colours; 0: AVC does not look at colours", 0.0),
    "avc_start": Flag(number(float, 0, 0.9), "fraction of the training after which the terms set in: until then the "
                                             "CAMs form", 0.2),
}
