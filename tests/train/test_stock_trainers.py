"""Trainers of transformers with a SEAM model and its processor, as they come."""

import pytest
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from seam.configuration_seam import SeamConfig

pytestmark = pytest.mark.oldest

TEXTS = ["one two three", "the old goat eats the hay", "stop", "the music please"]


@pytest.mark.parametrize("given", ["processor", "tokenizer", "nothing"])
@pytest.mark.parametrize("prompt", [None, "Stop! "])
def test_seq2seq_trainer_predicts_with_generate(model, processor, waveforms, tmp_path, given, prompt):
    def collate(rows):
        audio, texts = zip(*rows, strict=True)
        return dict(processor(audio=list(audio), text=list(texts), prompt=prompt))

    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=6,
        per_device_eval_batch_size=3,  # the last batch has other lengths: they are padded to each other
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        data_collator=collate,
        processing_class={"processor": processor, "tokenizer": processor.tokenizer}.get(given),
    )
    rows = list(zip(waveforms, TEXTS, strict=True))
    output = trainer.predict(rows)
    assert processor.batch_decode(output.label_ids) == TEXTS
    expected = [
        processor.decode(model.generate(**processor(audio=one, prompt=prompt), max_new_tokens=6)[0])
        for one in waveforms
    ]
    assert processor.batch_decode(output.predictions) == expected and all(expected)


def test_the_padding_is_the_language_models(processor, model):
    assert processor.pad_token_id == processor.tokenizer.pad_token_id
    config = SeamConfig.from_dict(model.config.to_dict())
    config.pad_token_id = 7
    assert config.text_config.pad_token_id == config.pad_token_id == 7
    config.pad_token_id = None
    assert config.pad_token_id == config.eoa_token_id
    assert "pad_token_id" not in config.to_diff_dict()
