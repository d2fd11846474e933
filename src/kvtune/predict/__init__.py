"""What is likely to come, learned online: output lengths, arrivals, reuse of blocks. Tensor-free.

Every predictor stands beside its constant baseline and its oracle, and a gate lets it speak only while past
data prove it better.
"""

from kvtune.predict.arrivals import ArrivalForecast, ArrivalPredictor
from kvtune.predict.distribution import LengthDistribution
from kvtune.predict.gate import Gate
from kvtune.predict.lengths import LengthKey, LengthPredictor
from kvtune.predict.peak import Growth, PeakForecast, horizons_of, peak_forecast, survival_rows
from kvtune.predict.reuse import ReturnPredictor
from kvtune.predict.sessions import PrefixSessions, PrefixView

__all__ = [
    "ArrivalForecast",
    "ArrivalPredictor",
    "Gate",
    "Growth",
    "LengthDistribution",
    "LengthKey",
    "LengthPredictor",
    "PeakForecast",
    "PrefixSessions",
    "PrefixView",
    "ReturnPredictor",
    "horizons_of",
    "peak_forecast",
    "survival_rows",
]
