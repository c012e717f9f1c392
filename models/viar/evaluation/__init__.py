"""What is measured of trained models."""

from ..tokenizer.reconstruction import psnr, ssim
from .classifier import Classifier, train_classifier
from .cost import seconds_of, training_bytes
from .metrics import accuracy, balanced_labels, class_consistency, inpainting_consistency

__all__ = [
    "Classifier",
    "accuracy",
    "balanced_labels",
    "class_consistency",
    "inpainting_consistency",
    "psnr",
    "seconds_of",
    "ssim",
    "train_classifier",
    "training_bytes",
]
