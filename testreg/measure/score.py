"""The scores that neurons may be ranked by, see `testreg.measure.ranking.SUMS`."""

from typing import Literal

Score = Literal["attribution", "contribution", "activation"]
