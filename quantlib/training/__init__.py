"""What the recipes share: image sets, a training loop, metrics, a report page. The library itself does not import it."""

from quantlib.training.data import DataError, Images, digits, read_images
from quantlib.training.loop import Epoch, Fit, fit
from quantlib.training.metrics import accuracy, batched, confusion, predictions

__all__ = ["DataError", "Epoch", "Fit", "Images", "accuracy", "batched", "confusion", "digits", "fit", "predictions", "read_images"]
