"""By CTranslate2: a sentence-transformers BERT, tokenized, batched by length and pooled as its users do, and
encoders as they are."""

import tempfile

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters.transformers import BertLoader, T5Loader, TransformersConverter
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
            spec.register_vocabulary([f"<{i}>" for i in range(model.config.vocab_size)])
            spec.validate()
            spec.optimize(quantization=compute_type)
        with tempfile.TemporaryDirectory() as folder:
            spec.save(folder)
            threads = torch.get_num_threads()
            self.model = ctranslate2.Encoder(folder, compute_type=compute_type, intra_threads=threads)

    def __call__(self, ids):
        return torch.from_numpy(np.asarray(self.model.forward_batch(ids).last_hidden_state))
