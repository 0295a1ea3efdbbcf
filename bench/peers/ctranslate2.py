"""By CTranslate2: a sentence-transformers BERT, tokenized, batched by length and pooled as its users do,
encoders as they are, and beam search."""

import tempfile

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters.transformers import (
    BartLoader,
    BertLoader,
    T5Loader,
    TransformersConverter,
)
from ctranslate2.specs import TransformerEncoderModelSpec
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import T5ForConditionalGeneration


def is_held_to(isa):
    """The environment that `warpformer bench --isa` sets does it."""
    return True


class SentenceEncoder:
    """A BERT whose embeddings are the mean over its tokens, scaled to length 1.

    Args:
        path: the folder of the checkpoint.
        compute_type: "float32" or "int8".
        max_seq_length: tokens of a sentence that are read; the rest is cut off.
        batch_size: sentences per step, padded to the longest of them.
    """

    def __init__(self, path, compute_type, max_seq_length, batch_size=32):
        self.tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")
        self.tokenizer.enable_truncation(max_seq_length)
        self.tokenizer.no_padding()
        self.batch_size = batch_size
        with tempfile.TemporaryDirectory() as folder:
            TransformersConverter(str(path)).convert(folder, quantization=compute_type, force=True)
            threads = torch.get_num_threads()
            self.model = ctranslate2.Encoder(folder, compute_type=compute_type, intra_threads=threads)

    def encode(self, sentences):
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(sentences)]
        order = np.argsort([len(sentence) for sentence in ids], kind="stable")
        embeddings = np.concatenate(
            [
                self._embed([ids[i] for i in order[start : start + self.batch_size]])
                for start in range(0, len(order), self.batch_size)
            ]
        )
        return embeddings[np.argsort(order)]

    def _embed(self, batch):
        hidden = torch.from_numpy(np.asarray(self.model.forward_batch(batch).last_hidden_state))
        lengths = torch.tensor([len(sentence) for sentence in batch])
        mask = torch.arange(hidden.shape[1]) < lengths[:, None]
        total = mask[:, None].float() @ hidden  # its direction is the mean's
        return F.normalize(total.squeeze(1)).numpy()


class Encoder:
    """Hidden states [B, T, C] of lists of ids, by the encoder of transformers' BertModel or
    T5ForConditionalGeneration."""

    def __init__(self, model, compute_type):
        with torch.no_grad():
            if isinstance(model, T5ForConditionalGeneration):
                spec = TransformerEncoderModelSpec(T5Loader().get_model_spec(model).encoder)
                spec.config.layer_norm_epsilon = model.config.layer_norm_epsilon
            else:
                model.config.position_embedding_type = "absolute"  # which transformers 5 no longer writes
                spec = BertLoader().get_model_spec(model)
                spec.config.layer_norm_epsilon = model.config.layer_norm_eps
            spec.register_vocabulary(vocabulary(model))
        self.model = saved(spec, compute_type, ctranslate2.Encoder)

    def __call__(self, ids):
        return torch.from_numpy(np.asarray(self.model.forward_batch(ids).last_hidden_state))


class Translator:
    """Scores [B] of the best beams after lists of ids, by transformers' BartForConditionalGeneration.

    Args:
        start: what the decoder reads first.
    """

    def __init__(self, model, compute_type, start):
        config = model.config
        config.normalize_before, config.normalize_embedding = (
            False,
            True,
        )  # which transformers 5 no longer has
        with torch.no_grad():
            spec = BartLoader().get_model_spec(model)
            spec.register_source_vocabulary(vocabulary(model))
            spec.register_target_vocabulary(vocabulary(model))
        spec.config.bos_token, spec.config.eos_token = f"<{config.bos_token_id}>", f"<{config.eos_token_id}>"
        spec.config.unk_token, spec.config.decoder_start_token = f"<{config.pad_token_id}>", f"<{start}>"
        self.model = saved(spec, compute_type, ctranslate2.Translator)

    def __call__(self, ids, beams, tokens):
        rows = [[f"<{i}>" for i in row] for row in ids]
        found = self.model.translate_batch(
            rows,
            beam_size=beams,
            min_decoding_length=tokens,
            max_decoding_length=tokens,
            length_penalty=1,
            return_scores=True,
        )
        return torch.tensor([result.scores[0] for result in found])


def vocabulary(model):
    return [f"<{i}>" for i in range(model.config.vocab_size)]


def saved(spec, compute_type, cls):
    """The model of a specification, on torch's number of threads."""
    spec.validate()
    spec.optimize(quantization=compute_type)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        return cls(folder, compute_type=compute_type, intra_threads=torch.get_num_threads())
