"""Data that is drawn anew in every epoch."""

from transformers import TrainerCallback


class SetEpoch(TrainerCallback):
    """
    Tells data sets and samplers which epoch begins, so that what they draw depends on its number alone. accelerate's
    loaders do so as well, but reach not all of them with several processes, nor after a resume within an epoch.

    Args:
        listeners: have a `set_epoch` method.
    """

    def __init__(self, *listeners):
        self.listeners = listeners

    def on_epoch_begin(self, args, state, control, **kwargs):
        for listener in self.listeners:
            listener.set_epoch(int(state.epoch or 0))


class StartStream(TrainerCallback):
    """
    Tells a stream how far a training that is resumed has come, so that it does not read again what the `Trainer` drops.

    Args:
        stream ([`SpeechStream`]): of the training.
    """

    def __init__(self, stream):
        self.stream = stream

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.stream.start_at(0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps)
