"""What is measured of trained models."""

from ..tokenizer.reconstruction import psnr, ssim
from .classifier import Classifier, train_classifier
from .cost import seconds_of, training_bytes
from .judge import JUDGE, JudgeRecipe, judge
from .memorisation import memorisation, nearest_distances
from .metrics import accuracy, balanced_labels, class_consistency, inpainting_consistency
from .moments import Moments, frechet_distance
from .scores import inception_score, kernel_distance, precision_recall

__all__ = [
    "JUDGE",
    "Classifier",
    "JudgeRecipe",
    "Moments",
    "accuracy",
    "balanced_labels",
    "class_consistency",
    "frechet_distance",
    "inception_score",
    "inpainting_consistency",
    "judge",
    "kernel_distance",
    "memorisation",
    "nearest_distances",
    "precision_recall",
    "psnr",
    "seconds_of",
    "ssim",
    "train_classifier",
    "training_bytes",
]
