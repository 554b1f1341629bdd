"""What the recipes share: data sets, the training loop, losses, metrics, a report page. The library itself does not import it."""

from quantlib.training.checkpoint import CheckpointError
from quantlib.training.data import Augment, DataError, ImageFiles, Images, cifar, digits, image_files, read_images
from quantlib.training.logs import Epoch
from quantlib.training.loop import Fit, TrainingError, fit, is_main_process
from quantlib.training.losses import CrossEntropy, Distillation, load_teacher
from quantlib.training.metrics import accuracy, batched, confusion, predictions, right_among, right_answers
from quantlib.training.optim import (
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Course,
    EachStep,
    Group,
    Linear,
    Ramp,
    RMSprop,
    Staircase,
    Steps,
    Warmup,
)
from quantlib.training.steps import density, use_gating, use_real_weights
