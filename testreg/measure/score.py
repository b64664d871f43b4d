"""The names of the scores by which neurons can be ranked; `testreg.measure.ranking.SUMS` says how each is computed."""

from typing import Literal

Score = Literal["attribution", "contribution", "activation"]
