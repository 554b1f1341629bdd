"""What a network costs before any hardware is chosen: `count`, `micronet_cost`, `systolic_latency`. Each runs the model once, on a copy."""

from quantlib.analysis._steps import AnalysisError as AnalysisError
from quantlib.analysis.counting import count as count
from quantlib.analysis.micronet import CIFAR100 as CIFAR100
from quantlib.analysis.micronet import IMAGENET as IMAGENET
from quantlib.analysis.micronet import THRESHOLD_BITS as THRESHOLD_BITS
from quantlib.analysis.micronet import Reference as Reference
from quantlib.analysis.micronet import micronet_cost as micronet_cost
from quantlib.analysis.systolic import plot as plot
from quantlib.analysis.systolic import speedup_table as speedup_table
from quantlib.analysis.systolic import systolic_latency as systolic_latency
