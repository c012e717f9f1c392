"""What is measured of trained models."""

from ..tokenizer.reconstruction import psnr, ssim
from .classifier import Classifier, train_classifier
from .copies import memorisation, nearest_distances
from .cost import seconds_of, training_bytes
from .features import (
    Extractor,
    FeatureNetwork,
    Features,
    extractor_network,
    features_of,
    judge_network,
)
from .inception import inception_network
from .judging import JUDGE, JudgeRecipe, judge
from .metrics import accuracy, balanced_labels, class_consistency, inpainting_consistency
from .moments import Moments, frechet_distance
from .quality import Evaluation, Quality, Reference, data_reference, evaluate_images, with_held_out
from .references import Pictures, find_pictures, read_reference, save_reference
from .scores import inception_score, kernel_distance, precision_recall

__all__ = [
    "JUDGE",
    "Classifier",
    "Evaluation",
    "Extractor",
    "FeatureNetwork",
    "Features",
    "JudgeRecipe",
    "Moments",
    "Pictures",
    "Quality",
    "Reference",
    "accuracy",
    "balanced_labels",
    "class_consistency",
    "data_reference",
    "evaluate_images",
    "extractor_network",
    "features_of",
    "find_pictures",
    "frechet_distance",
    "inception_network",
    "inception_score",
    "inpainting_consistency",
    "judge",
    "judge_network",
    "kernel_distance",
    "memorisation",
    "nearest_distances",
    "precision_recall",
    "psnr",
    "read_reference",
    "save_reference",
    "seconds_of",
    "ssim",
    "train_classifier",
    "training_bytes",
    "with_held_out",
]
