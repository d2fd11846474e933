"""What is likely to come, learned online: output lengths, arrivals, reuse of blocks. Tensor-free.

Every predictor stands beside its constant baseline and its oracle, and a gate lets it speak only while past
data prove it better.
"""

from kvtune.predict.distribution import LengthDistribution
from kvtune.predict.gate import Gate
from kvtune.predict.lengths import LengthKey, LengthPredictor
from kvtune.predict.peak import Growth, PeakForecast, horizons_of, peak_forecast, survival_rows
from kvtune.predict.sessions import PrefixSessions, PrefixView

__all__ = [
    "Gate",
    "Growth",
    "LengthDistribution",
    "LengthKey",
    "LengthPredictor",
    "PeakForecast",
    "PrefixSessions",
    "PrefixView",
    "horizons_of",
    "peak_forecast",
    "survival_rows",
]
