"""Detection of one object per picture (DAC-SDC): data set, augmentation, loss, metric, drawings, and a small set made from images."""

from quantlib.training.detection.augment import PUBLISHED, Ranges
from quantlib.training.detection.boxes import corners, overlap
from quantlib.training.detection.data import SIZE, BoxImages, Label, box_images, frame_weights, read_xml
from quantlib.training.detection.drawing import draw_boxes, in_pixels, save_pictures, save_png, sheet
from quantlib.training.detection.head import BoxOverlap, DetectionLoss, best_boxes, decode
from quantlib.training.detection.pasted import make_box_images
