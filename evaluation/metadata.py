"""Results as the Hub's evaluation metadata."""

from huggingface_hub import EvalResult

TASK = "automatic-speech-recognition"


def eval_result(test_set: str, metric: str, name: str, value: float) -> EvalResult:
    """
    Args:
        test_set: its name for people; its identifier is made of it.
        metric: the Hub's identifier, "wer" or "cer".
        name: of the metric, for people.
        value: in percent.
    """
    return EvalResult(
        task_type=TASK,
        dataset_type=test_set.lower().replace(" ", "-"),
        dataset_name=test_set,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 2),
    )
