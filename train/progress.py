"""The bar of a training."""

from tqdm.auto import tqdm
from transformers import ProgressCallback


class Progress(ProgressCallback):
    """
    The time left follows from the mean of all steps since the start, with the evaluations and checkpoints between them.
    As in transformers it would follow from the last few, and count the steps before a resume as made within the first.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, smoothing=0, unit="step", dynamic_ncols=True
            )

    def close(self) -> None:
        """Of a training that ends by an error, which gets a line of its own."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
