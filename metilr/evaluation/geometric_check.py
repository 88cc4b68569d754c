"""The geometric check of an evaluation: local features decide how far an answer by descriptors is to be believed.

Descriptors say what two images have in common, wherever it lies; the check asks whether it lies alike.
"""

from dataclasses import replace

from metilr.data.ground_truth import GroundTruth
from metilr.evaluation.recognition import Recognition, figures_of
from metilr.geometry.check import GeometricCheck, count_inliers
from metilr.geometry.evidence import Checked, apply_evidence, tune_evidence


def check_recognition(
    recognition: Recognition, ground_truth: GroundTruth, check: GeometricCheck, quiet: bool = True
) -> tuple[Recognition, GeometricCheck]:
    """Check the answers to val and test, choosing boost and gate on val.

    Args:
        recognition: Has the candidates, ``check.candidates`` exhibits a query.
        ground_truth: Names the images.
        check: What is done; its own boost and gate are left aside.
        quiet: Show no progress.

    Returns:
        The recognition with other confidences and, with ``reorder``, labels; and the check with boost and gate.

    Raises:
        UserError: If features cannot be kept.
    """
    files = {split: [ground_truth.image(path) for path in paths] for split, paths in ground_truth.paths.items()}
    labels, evidence = ground_truth.labels, {}
    for split, matches in recognition.matches.items():
        candidates = matches.rows[:, : check.candidates]
        inliers = count_inliers(check, files[split], candidates, files["database"], quiet)
        evidence[split] = Checked(matches, inliers, labels["database"], ground_truth.n_classes, recognition.tau)
    boost, gate = tune_evidence(recognition.answers["val"], evidence["val"], labels["val"], check.reorder)
    answers = {split: apply_evidence(of, evidence[split], boost, gate) for split, of in recognition.answers.items()}
    figures = {split: figures_of(of, labels[split]) for split, of in answers.items()}
    checked = replace(recognition, answers=answers, figures=figures, checked=evidence)
    return checked, replace(check, boost=boost, gate=gate)
